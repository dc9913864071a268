//! What the documentation says of the configuration, of errors, of known issues,
//! of field cases and of faults is what there is.

use std::path::{Path, PathBuf};

use vmsnap_agent::{
    config::Config,
    operate::{health, metrics::METRICS},
    planning::{Reason, issues},
    trust::rights::{Deed, RIGHTS},
};

const DOCS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs");

fn read(page: &str) -> String {
    let path = Path::new(DOCS).join(page);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn the_example_configuration_is_the_defaults() {
    let example = Config::parse(&read("agent.example.toml"), "agent.example.toml").unwrap();
    assert_eq!(example, Config::default());
    assert_eq!(example.check(), Ok(()));
}

#[test]
fn every_key_of_the_configuration_is_explained_with_its_default() {
    let page = read("configuration.md");
    let keys: toml::Table = toml::from_str(&toml::to_string(&Config::default()).unwrap()).unwrap();
    for (section, keys) in &keys {
        for (key, default) in keys.as_table().unwrap() {
            let line = format!("| `{section}.{key}` | `{default}` |");
            assert!(page.contains(&line), "configuration.md lacks {line}");
        }
    }
}

#[test]
fn the_page_of_metrics_is_what_there_is() {
    let page = read("metrics.md");
    let rows: Vec<&str> = page
        .lines()
        .filter(|line| line.starts_with("| `"))
        .collect();
    let wanted: Vec<String> = METRICS
        .iter()
        .map(|metric| {
            let labels: Vec<String> = metric
                .labels
                .iter()
                .map(|label| format!("`{label}`"))
                .collect();
            format!(
                "| `{}` | {} | {} | {} |",
                metric.name,
                metric.kind.name(),
                labels.join(", "),
                metric.help
            )
        })
        .collect();
    assert_eq!(rows, wanted);
    for kind in health::Kind::ALL {
        assert!(page.contains(&format!("`{}`", kind.name())), "{kind:?}");
    }
}

#[test]
fn the_guide_has_a_word_on_every_alert_and_on_every_problem() {
    let guide = read("operating.md");
    let rules = read("../packaging/prometheus/vmsnap.rules.yml");
    let alerts: Vec<&str> = rules
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- alert: "))
        .collect();
    assert!(alerts.len() > 10, "{alerts:?}");
    for alert in alerts {
        assert!(guide.contains(&format!("### {alert}\n")), "{alert}");
    }
    for kind in health::Kind::ALL {
        assert!(guide.contains(&format!("`{}`", kind.name())), "{kind:?}");
    }
}

/// The metrics that a text names: those of a histogram by their parts.
fn named(text: &str) -> Vec<String> {
    let mut names: Vec<String> = text
        .split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .filter(|word| word.starts_with("vmsnap_"))
        .map(|word| word.trim_end_matches("_bucket").to_owned())
        .collect();
    names.sort();
    names.dedup();
    names
}

#[test]
fn rules_and_dashboard_name_no_metric_that_is_not_there_and_the_dashboard_all() {
    let known: Vec<&str> = METRICS.iter().map(|metric| metric.name).collect();
    let dashboard = named(&read("../packaging/grafana/vmsnap.json"));
    for name in named(&read("../packaging/prometheus/vmsnap.rules.yml"))
        .iter()
        .chain(&dashboard)
    {
        assert!(known.contains(&name.as_str()), "{name}");
    }
    for name in known {
        assert!(dashboard.iter().any(|it| it == name), "no panel on {name}");
    }
}

#[test]
fn every_page_of_an_error_says_when_it_comes_what_it_tells_what_to_do_and_what_was_touched() {
    let index = read("errors/README.md");
    for reason in Reason::ALL {
        let page = read(&format!("errors/{reason}.md"));
        assert!(page.starts_with(&format!("# {reason}\n")), "{reason}");
        for section in [
            "## When it comes",
            "## Metadata",
            "## What to do",
            "## Was anything touched?",
        ] {
            assert!(page.contains(section), "{reason} lacks '{section}'");
        }
        assert!(
            index.contains(&format!("[{reason}]({reason}.md)")),
            "{reason}"
        );
    }
}

#[test]
fn the_page_of_known_issues_is_the_catalogue() {
    let page = read("known-issues.md");
    let rows: Vec<&str> = page
        .lines()
        .filter(|line| line.starts_with("| `"))
        .collect();
    let wanted: Vec<String> = issues::catalogue()
        .iter()
        .map(|issue| {
            let mut agent = Vec::new();
            if issue.warns() {
                agent.push("warns".to_owned());
            }
            if let Some(reason) = issue.reason {
                agent.push(format!("[{reason}](errors/{reason}.md)"));
            }
            if issue.explains_faults() {
                agent.push("explains the failure".to_owned());
            }
            format!(
                "| `{}` | {} | {} | {} | {} | {} |",
                issue.id,
                issue.title,
                issue.applies_when,
                issue.what_happens,
                issue.what_to_do,
                agent.join(", ")
            )
        })
        .collect();
    assert_eq!(rows, wanted);
}

#[test]
fn every_warning_of_a_known_issue_is_among_the_codes_of_warnings() {
    let page = read("events.md");
    let mut codes: Vec<&str> = vec![issues::FULL_BEFORE];
    codes.extend(
        issues::catalogue()
            .iter()
            .filter(|issue| issue.warns())
            .map(|issue| issue.id.as_str()),
    );
    for code in codes {
        assert!(
            page.contains(&format!("| `{code}` |")),
            "events.md lacks {code}"
        );
    }
}

#[test]
fn every_link_between_pages_leads_somewhere() {
    let root = Path::new(DOCS).join("..");
    let mut pages = vec![root.join("README.md")];
    for folder in [DOCS.to_owned(), format!("{DOCS}/errors")] {
        let files = std::fs::read_dir(folder).unwrap();
        pages.extend(files.map(|file| file.unwrap().path()));
    }
    for page in pages
        .iter()
        .filter(|page| page.extension().is_some_and(|it| it == "md"))
    {
        let text = std::fs::read_to_string(page).unwrap();
        for link in text
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split(')').next())
        {
            let target = link.split('#').next().unwrap_or_default();
            if target.is_empty() || target.contains("://") {
                continue;
            }
            let path = page.parent().unwrap().join(target);
            assert!(path.exists(), "{}: '{link}' leads nowhere", page.display());
        }
    }
}

/// All Rust sources below a folder, without what was built.
fn sources(folder: &Path, into: &mut Vec<(PathBuf, String)>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let named = |name: &str| path.file_name().is_some_and(|it| it == name);
        if path.is_dir() && !named("target") && !named(".git") {
            sources(&path, into);
        } else if path.extension().is_some_and(|it| it == "rs") {
            let code = std::fs::read_to_string(&path).unwrap();
            into.push((path, code));
        }
    }
}

/// Whether a source is the one of a module: `merging::order` may be
/// `merging/order.rs`, and `merging` also `merging/main.rs`.
/// Unit tests may stand in a file beside their module's, or below it.
fn is_of(source: &Path, module: &str) -> bool {
    let file = module.replace("::", "/");
    ["", "/main", "/tests", "_tests"]
        .iter()
        .any(|end| source.ends_with(format!("{file}{end}.rs")))
}

#[test]
fn every_test_that_the_pages_of_cases_and_faults_name_is_where_they_say() {
    let mut all = Vec::new();
    sources(&Path::new(DOCS).join(".."), &mut all);
    for (page, least) in [("field-cases.md", 30), ("faults.md", 20)] {
        let mut named = 0;
        // Every other piece between backticks is code.
        for test in read(page).split('`').skip(1).step_by(2) {
            let Some((module, name)) = test.rsplit_once("::") else {
                continue;
            };
            assert!(
                all.iter().any(
                    |(path, code)| is_of(path, module) && code.contains(&format!("fn {name}("))
                ),
                "{page}: no test {test}"
            );
            named += 1;
        }
        assert!(named > least, "only {named} tests are named in {page}");
    }
}

#[test]
fn the_page_of_trust_shows_the_table_of_rights() {
    let page = read("trust.md");
    let section = page.split("## Rights").nth(1).unwrap();
    let section = section.split("## Audit").next().unwrap();
    let rows: Vec<&str> = section
        .lines()
        .filter(|line| line.starts_with("| ") && !line.ends_with("needs |"))
        .filter(|line| !line.ends_with("needs over the VM |"))
        .collect();
    let calls = RIGHTS
        .iter()
        .map(|right| format!("| `{}.{}` | {} |", right.service, right.method, right.needs));
    let deeds = Deed::ALL.iter().map(|deed| {
        let beyond = if deed.needs_all() {
            ", over all VMs"
        } else {
            ""
        };
        format!("| {deed} | {}{beyond} |", deed.needs())
    });
    assert_eq!(rows, calls.chain(deeds).collect::<Vec<_>>());
}
