//! Whatever breaks in the middle of a run, the guest runs, is thawed, its disks
//! are whole, and the run can be read back: the quick form of `cargo xtask soak`.

use anyhow::Result;
use vmsnap_tests::{
    Lab,
    contract::{Choice, run_contract},
};

#[test]
fn whatever_breaks_in_the_middle_the_guest_runs_with_whole_disks_and_the_run_can_be_read()
-> Result<()> {
    let lab = Lab::from_env()?;
    let report = run_contract(
        &lab,
        &Choice {
            one_in: 40,
            // The same part every time, so that a change of its result is the
            // product's; `cargo xtask soak` runs all.
            seed: 0,
            only: String::new(),
        },
    )?;
    let text = report.text();
    assert!(report.failures().is_empty(), "\n{text}");
    show(&text);
    Ok(())
}

#[expect(clippy::print_stdout, reason = "the matrix, with --no-capture")]
fn show(text: &str) {
    println!("{text}");
}
