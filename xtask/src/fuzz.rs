//! `cargo xtask fuzz`: the tests with inputs at random, with many inputs.
//!
//! Invariant: success means that at least as many inputs as asked for were
//! dealt with, as the tests themselves counted them.

use std::fs;

use anyhow::{Context as _, Result, bail};

use crate::{
    run::{command, say, step},
    setup, target,
};

/// The tests that take their number of inputs from the environment.
const TESTS: &str = "binary(=fuzz) | test(/^(fuzz|xml_fuzz)::/) | test(/^qcow2::tests::no_/)";

/// Runs them with so many inputs in all, and says how many each class had.
///
/// # Errors
/// When one of them fails, or there were fewer inputs.
pub fn run(inputs: u64) -> Result<()> {
    let mut build = setup::nextest()?;
    build.args(["run", "--workspace", "--locked", "--no-run"]);
    step("build of the tests", build)?;
    let folder = target().join("xtask/fuzz");
    match fs::remove_dir_all(&folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot clear {}", folder.display()));
        }
        _ => {}
    }
    fs::create_dir_all(&folder)
        .with_context(|| format!("cannot make folder {}", folder.display()))?;
    let nextest = setup::nextest()?;
    let mut tests = command(target().join("debug/vmsnap-lab"), ["up", "--"]);
    tests
        .arg(nextest.get_program())
        .args(nextest.get_args())
        .args(["run", "--workspace", "--locked", "-E", TESTS])
        .env("VMSNAP_FUZZ_INPUTS", inputs.to_string())
        .env("VMSNAP_FUZZ_TALLY", &folder);
    let ran = step("inputs at random", tests);
    let classes = tally(&folder)?;
    let mut all = 0;
    for (name, count, milliseconds) in &classes {
        say(&format!(
            "{name:<24} {count:>8} inputs {:>8.1} s",
            *milliseconds as f64 / 1000.0
        ));
        all += count;
    }
    let verdict = match &ran {
        Ok(()) => "0 failures",
        Err(_) => "with failures, see above",
    };
    say(&format!(
        "{all} inputs in {} classes: {verdict}",
        classes.len()
    ));
    ran?;
    if all < inputs {
        bail!("{all} inputs were dealt with, and {inputs} were asked for");
    }
    Ok(())
}

/// What each class left: name, inputs, milliseconds.
fn tally(folder: &std::path::Path) -> Result<Vec<(String, u64, u64)>> {
    let mut classes = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let line =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let parts: Vec<&str> = line.trim_end().split('\t').collect();
        let [name, inputs, milliseconds] = parts.as_slice() else {
            bail!("{} does not hold three values: {line}", path.display());
        };
        classes.push(((*name).to_owned(), inputs.parse()?, milliseconds.parse()?));
    }
    classes.sort();
    Ok(classes)
}
