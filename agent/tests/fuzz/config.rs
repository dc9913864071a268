//! The configuration file at random.

use std::time::{Duration, Instant};

use proptest::{collection::vec, prelude::*, sample::select};
use vmsnap_agent::config::Config;
use vmsnap_fuzz::{
    Class,
    inputs::{damaged_text, numbers, texts},
};

const EXAMPLE: &str = include_str!("../../../docs/agent.example.toml");

const KEYS: &[(&str, &[&str])] = &[
    (
        "libvirt",
        &["uri", "read_timeout", "effect_timeout", "release_timeout"],
    ),
    ("listen", &["socket", "socket_group", "socket_mode", "tcp"]),
    ("journal", &["path", "keep_days", "keep_runs"]),
    ("storage", &["exclusive"]),
    (
        "limits",
        &["max_chain", "max_runs", "heartbeat", "shutdown"],
    ),
    ("guards", &["grace"]),
    ("log", &["level", "format"]),
];

/// What holds for a text, whatever it is.
fn holds(text: &str) -> Result<(), TestCaseError> {
    let config = match Config::parse(text, "agent.toml") {
        Ok(config) => config,
        Err(error) => {
            prop_assert!(error.place.starts_with("agent.toml"), "{error}");
            prop_assert!(!error.problem.is_empty());
            return Ok(());
        }
    };
    if let Err(error) = config.check() {
        prop_assert!(!error.place.is_empty() && !error.problem.is_empty());
        return Ok(());
    }
    // What passed can be used: each time lies in a future that there is.
    for seconds in [
        config.libvirt.read_timeout,
        config.libvirt.effect_timeout,
        config.libvirt.release_timeout,
        config.limits.heartbeat,
        config.limits.shutdown,
        config.guards.grace,
    ] {
        let time = Duration::from_secs(seconds);
        prop_assert!(Instant::now().checked_add(time).is_some(), "{seconds} s");
        let later = jiff::Timestamp::now().checked_add(time);
        prop_assert!(later.is_ok(), "{seconds} s");
    }
    let age = jiff::SignedDuration::from_hours(i64::from(config.journal.keep_days) * 24);
    prop_assert!(jiff::Timestamp::now().checked_sub(age).is_ok());
    prop_assert!(
        config
            .tcp()
            .is_none_or(|address| address.ip().is_loopback())
    );
    prop_assert!(config.socket_mode().is_some_and(|mode| mode <= 0o777));
    prop_assert!(config.log_filter().is_ok());
    // What `check --dump` prints is the same configuration.
    let dumped = toml::to_string(&config)
        .map_err(|error| TestCaseError::fail(format!("cannot be printed: {error}")))?;
    prop_assert_eq!(Config::parse(&dumped, "dump"), Ok(config));
    Ok(())
}

fn values() -> impl Strategy<Value = String> {
    prop_oneof![
        3 => numbers().prop_map(|number| number.to_string()),
        3 => texts().prop_map(|text| toml::Value::String(text).to_string()),
        2 => select(vec![
            "true", "'0660'", "'9999'", "''", "'json'", "'127.0.0.1:0'", "'[::1]:1'",
            "'0.0.0.0:1'", "'vmsnap_agent=debug,info'", "'a=b=c'", "1e400", "nan", "0x7fffffff",
            "1979-05-27T07:32:00Z", "[]", "{}", "[[1]]", "{a={b={}}}", "'/run/s'",
        ])
        .prop_map(str::to_owned),
        1 => texts(),
    ]
}

#[test]
fn no_damage_to_the_example_makes_the_agent_start_on_what_cannot_work() {
    let inputs = damaged_text(EXAMPLE, "\\[?[a-z]{1,8}\\]?( = [0-9'\"\\[{]{0,4})?");
    Class::new("configuration, damaged", 60).check(&inputs, |text| holds(&text));
}

#[test]
fn no_values_in_a_configuration_make_the_agent_start_on_what_cannot_work() {
    let table = select(KEYS.to_vec())
        .prop_flat_map(|(table, keys)| (Just(table), vec((select(keys.to_vec()), values()), 0..3)));
    let inputs = vec(table, 0..4).prop_map(|tables| {
        let mut text = String::new();
        for (table, lines) in tables {
            text.push_str(&format!("[{table}]\n"));
            for (key, value) in lines {
                text.push_str(&format!("{key} = {value}\n"));
            }
        }
        text
    });
    Class::new("configuration, values", 80).check(&inputs, |text| holds(&text));
}

#[test]
fn nesting_in_a_configuration_ends_in_an_error() {
    let inputs = (
        1..50_000_usize,
        select(vec!["[", "{a=", "[[", "a.", "'''", "\"\"\""]),
    );
    Class::new("configuration, nested", 10)
        .few(64)
        .check(&inputs, |(deep, what)| {
            holds(&format!("x = {}", what.repeat(deep)))?;
            holds(&format!("[{}a]", "a.".repeat(deep.min(5_000))))
        });
}
