//! Where a configuration comes from: defaults, then the file, then the
//! environment, then the command line; the later one wins.
//!
//! Invariants: every key can be set in every layer; its variable follows from its
//! name (`limits.max_chain` is `VMSNAP_AGENT_LIMITS_MAX_CHAIN`), so that none is
//! forgotten; a variable with our prefix that is no key is refused, because it is
//! a slip; whatever is refused names the layer that it came from.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use toml::{Table, Value};

use super::{Config, ConfigError, DEFAULT_PATH};
use crate::planning::names;

/// What the variables of all keys begin with.
pub const PREFIX: &str = "VMSNAP_AGENT_";
/// The variable that names the file itself, and is no key.
pub const FILE: &str = "VMSNAP_AGENT_CONFIG";

/// One key with a value, from the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// How it was given, such as `--set`.
    pub flag: String,
    /// Its key, such as `limits.max_chain`.
    pub key: String,
    /// Its value, as text.
    pub value: String,
}

/// All layers over the defaults.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Layers {
    /// The file that was named; without one the default file is read if it exists.
    pub file: Option<PathBuf>,
    /// The environment; only our own variables are looked at.
    pub environment: Vec<(String, String)>,
    /// The command line, in its order.
    pub settings: Vec<Setting>,
}

/// A configuration that was checked, with where each key's value comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    /// The configuration.
    pub config: Config,
    /// Where a value comes from, by key; keys with their defaults are absent.
    pub sources: BTreeMap<String, String>,
}

/// All keys that one value can be given for, with their defaults.
fn keys() -> BTreeMap<String, Value> {
    let Ok(Value::Table(sections)) = Value::try_from(Config::default()) else {
        return BTreeMap::new();
    };
    sections
        .into_iter()
        .filter_map(|(section, keys)| match keys {
            Value::Table(keys) => Some((section, keys)),
            _ => None,
        })
        .flat_map(|(section, keys)| {
            keys.into_iter()
                .map(move |(key, default)| (format!("{section}.{key}"), default))
        })
        .collect()
}

/// The variable of a key.
#[must_use]
pub fn variable(key: &str) -> String {
    format!("{PREFIX}{}", key.replace('.', "_").to_uppercase())
}

/// A value as text, of the kind that the default is of.
fn value(text: &str, default: &Value) -> Result<Value, String> {
    let shown = text.escape_debug();
    match default {
        Value::String(_) => Ok(Value::String(text.to_owned())),
        Value::Integer(_) => text
            .trim()
            .parse()
            .map(Value::Integer)
            .map_err(|_| format!("'{shown}' is not a whole number")),
        Value::Boolean(_) => text
            .trim()
            .parse()
            .map(Value::Boolean)
            .map_err(|_| format!("'{shown}' is neither true nor false")),
        _ => toml::from_str::<Table>(&format!("value = {text}"))
            .ok()
            .and_then(|mut table| table.remove("value"))
            .ok_or_else(|| format!("'{shown}' is not a value as the file has it")),
    }
}

/// The line of the file on which a key stands; 0 when it cannot be told.
fn line_of(text: &str, key: &str) -> usize {
    let Some((section, name)) = key.split_once('.') else {
        return 0;
    };
    let mut within = "";
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim();
        if let Some(header) = line.strip_prefix('[') {
            within = header.split(']').next().unwrap_or_default().trim();
        } else if within == section
            && let Some((before, _)) = line.split_once('=')
            && before.trim() == name
        {
            return number;
        }
    }
    0
}

impl Layers {
    /// Puts the layers over the defaults and checks what comes of it.
    ///
    /// # Errors
    /// What cannot be read, understood or work, and the layer it came from.
    pub fn load(&self) -> Result<Loaded, ConfigError> {
        let keys = keys();
        let (mut table, mut sources) = self.of_file()?;
        for (source, key, text) in self.overrides(&keys)? {
            let refused = |problem: String| ConfigError {
                place: source.clone(),
                problem: format!("{key}: {problem}"),
            };
            let Some((section, name)) = key.split_once('.') else {
                continue;
            };
            let value = value(&text, &keys[&key]).map_err(refused)?;
            // Alone first, so that what is wrong with it is not blamed on others.
            let mut alone = Table::new();
            alone.insert(name.to_owned(), value.clone());
            let alone = Table::from_iter([(section.to_owned(), Value::Table(alone))]);
            alone
                .try_into::<Config>()
                .map_err(|error| refused(error.message().trim().to_owned()))?;
            let section = table
                .entry(section)
                .or_insert_with(|| Value::Table(Table::new()));
            if let Value::Table(section) = section {
                section.insert(name.to_owned(), value);
            }
            sources.insert(key, source);
        }
        let config: Config = table.try_into().map_err(|error| ConfigError {
            place: "the configuration".into(),
            problem: error.message().trim().to_owned(),
        })?;
        config.check().map_err(|error| ConfigError {
            place: match sources.get(&error.place) {
                Some(source) => format!("{source}: {}", error.place),
                None => error.place,
            },
            problem: error.problem,
        })?;
        Ok(Loaded { config, sources })
    }

    /// The file's keys, and on which line each stands.
    fn of_file(&self) -> Result<(Table, BTreeMap<String, String>), ConfigError> {
        let path = self.file.as_deref().unwrap_or(Path::new(DEFAULT_PATH));
        let Some(text) = super::read(path, self.file.is_some())? else {
            return Ok(Default::default());
        };
        let place = path.display().to_string();
        // For its errors, which know the lines.
        Config::parse(&text, &place)?;
        let table: Table = toml::from_str(&text).map_err(|error| ConfigError {
            place: place.clone(),
            problem: error.message().to_owned(),
        })?;
        let mut sources = BTreeMap::new();
        for (section, keys) in &table {
            for name in keys.as_table().into_iter().flat_map(Table::keys) {
                let key = format!("{section}.{name}");
                let source = match line_of(&text, &key) {
                    0 => place.clone(),
                    line => format!("{place}:{line}"),
                };
                sources.insert(key, source);
            }
        }
        Ok((table, sources))
    }

    /// Source, key and text of what the environment and the command line say.
    fn overrides(
        &self,
        keys: &BTreeMap<String, Value>,
    ) -> Result<Vec<(String, String, String)>, ConfigError> {
        let mut found = Vec::new();
        for (name, text) in &self.environment {
            if !name.starts_with(PREFIX) || name == FILE {
                continue;
            }
            let Some(key) = keys.keys().find(|key| variable(key) == *name) else {
                let known: Vec<String> = keys.keys().map(|key| variable(key)).collect();
                return Err(ConfigError {
                    place: format!("environment variable {name}"),
                    problem: unknown(name, &known),
                });
            };
            found.push((
                format!("environment variable {name}"),
                key.clone(),
                text.clone(),
            ));
        }
        for setting in &self.settings {
            if !keys.contains_key(&setting.key) {
                let known: Vec<String> = keys.keys().cloned().collect();
                return Err(ConfigError {
                    place: format!("{} {}", setting.flag, setting.key),
                    problem: unknown(&setting.key, &known),
                });
            }
            found.push((
                setting.flag.clone(),
                setting.key.clone(),
                setting.value.clone(),
            ));
        }
        Ok(found)
    }
}

fn unknown(name: &str, known: &[String]) -> String {
    let nearest = names::nearest(name, known.iter().map(String::as_str));
    match nearest {
        Some(nearest) => format!("is no key of the configuration; did you mean {nearest}?"),
        None => "is no key of the configuration; vmsnap-agent check --dump shows them all".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("vmsnap-c-{}.toml", uuid::Uuid::now_v7()));
        std::fs::write(&path, text).unwrap();
        path
    }

    fn layers(text: &str, environment: &[(&str, &str)], settings: &[(&str, &str)]) -> Layers {
        let own = |(a, b): &(&str, &str)| ((*a).to_owned(), (*b).to_owned());
        Layers {
            file: Some(file(text)),
            environment: environment.iter().map(own).collect(),
            settings: settings
                .iter()
                .map(|(key, value)| Setting {
                    flag: "--set".into(),
                    key: (*key).into(),
                    value: (*value).into(),
                })
                .collect(),
        }
    }

    fn load(layers: &Layers) -> Result<Loaded, ConfigError> {
        let loaded = layers.load();
        std::fs::remove_file(layers.file.as_ref().unwrap()).unwrap();
        loaded
    }

    #[test]
    fn each_layer_covers_the_one_below_it() {
        let text = "[limits]\nmax_chain = 5\nmax_runs = 5\nheartbeat = 5\n";
        let environment = [
            ("VMSNAP_AGENT_LIMITS_MAX_RUNS", "6"),
            ("VMSNAP_AGENT_LIMITS_HEARTBEAT", "6"),
            ("VMSNAP_AGENT_STORAGE_EXCLUSIVE", "true"),
            ("VMSNAP_AGENT_LOG_FORMAT", "json"),
            ("VMSNAP_AGENT_CONFIG", "/not/looked/at"),
            ("VMSNAP_OTHER", "x"),
        ];
        let settings = [("limits.heartbeat", "7"), ("listen.tcp", "127.0.0.1:1")];
        let layers = layers(text, &environment, &settings);
        let place = layers.file.as_ref().unwrap().display().to_string();
        let loaded = load(&layers).unwrap();
        let config = &loaded.config;
        assert_eq!(config.limits.max_chain, 5);
        assert_eq!(config.limits.max_runs, 6);
        assert_eq!(config.limits.heartbeat, 7);
        assert_eq!(config.limits.shutdown, Config::default().limits.shutdown);
        assert!(config.storage.exclusive);
        assert_eq!(config.log.format, super::super::LogFormat::Json);
        assert_eq!(config.listen.tcp, "127.0.0.1:1");
        assert_eq!(loaded.sources["limits.max_chain"], format!("{place}:2"));
        assert_eq!(
            loaded.sources["limits.max_runs"],
            "environment variable VMSNAP_AGENT_LIMITS_MAX_RUNS"
        );
        assert_eq!(loaded.sources["limits.heartbeat"], "--set");
        assert!(!loaded.sources.contains_key("limits.shutdown"));
    }

    #[test]
    fn what_is_no_key_is_refused_in_every_layer_with_the_nearest_one() {
        let error = load(&layers("", &[("VMSNAP_AGENT_LIMITS_MAX_RUN", "1")], &[])).unwrap_err();
        assert_eq!(
            error.to_string(),
            "environment variable VMSNAP_AGENT_LIMITS_MAX_RUN: is no key of the configuration; did \
             you mean VMSNAP_AGENT_LIMITS_MAX_RUNS?"
        );
        let error = load(&layers("", &[], &[("limits.max_chains", "1")])).unwrap_err();
        assert!(error.to_string().starts_with("--set limits.max_chains: "));
        assert!(error.problem.contains("limits.max_chain?"), "{error}");
        let error = load(&layers("[limits]\n\nmax_chains = 1\n", &[], &[])).unwrap_err();
        assert!(error.place.ends_with(":3"), "{error}");
    }

    #[test]
    fn a_value_that_is_wrong_is_blamed_on_its_own_layer() {
        for (environment, settings, said) in [
            (
                vec![("VMSNAP_AGENT_LIMITS_MAX_RUNS", "many")],
                vec![],
                "environment variable VMSNAP_AGENT_LIMITS_MAX_RUNS: limits.max_runs: 'many' is \
                 not a whole number",
            ),
            (
                vec![],
                vec![("storage.exclusive", "yes")],
                "--set: storage.exclusive: 'yes' is neither true nor false",
            ),
            (
                vec![("VMSNAP_AGENT_LISTEN_TCP", "0.0.0.0:1")],
                vec![],
                "environment variable VMSNAP_AGENT_LISTEN_TCP: listen.tcp: 0.0.0.0:1 is not a \
                 loopback address",
            ),
            (
                vec![("VMSNAP_AGENT_LOG_FORMAT", "xml")],
                vec![],
                "environment variable VMSNAP_AGENT_LOG_FORMAT: log.format: unknown variant `xml`",
            ),
            (
                vec![],
                vec![("limits.max_runs", "-1")],
                "--set: limits.max_runs: ",
            ),
        ] {
            let error = load(&layers("", &environment, &settings)).unwrap_err();
            assert!(error.to_string().starts_with(said), "{error}");
        }
        let error = load(&layers("\n[limits]\nmax_runs = 0\n", &[], &[])).unwrap_err();
        assert!(error.place.ends_with(".toml:3: limits.max_runs"), "{error}");
    }

    #[test]
    fn every_key_has_a_variable_of_its_own() {
        let variables: std::collections::BTreeSet<String> =
            keys().keys().map(|key| variable(key)).collect();
        assert_eq!(variables.len(), keys().len());
        assert!(variables.len() > 15);
        assert!(!variables.contains(FILE));
    }
}
