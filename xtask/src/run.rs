//! Running programs, and saying so.

use std::{
    ffi::OsStr,
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result, bail};

/// A command with arguments, in the checkout's folder.
pub fn command<A: AsRef<OsStr>>(
    program: impl AsRef<OsStr>,
    arguments: impl IntoIterator<Item = A>,
) -> Command {
    let mut command = Command::new(program);
    command.args(arguments).current_dir(crate::checkout());
    command
}

/// cargo, as it runs us.
pub fn cargo<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Command {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    command(cargo, arguments)
}

/// Runs one step with the terminal, and says how long it took.
///
/// # Errors
/// When it fails.
pub fn step(name: &str, mut command: Command) -> Result<()> {
    say(&format!("── {name}"));
    let since = Instant::now();
    let status = command.status().with_context(|| {
        format!(
            "{name}: '{}' cannot be run",
            command.get_program().display()
        )
    })?;
    if !status.success() {
        bail!("{name} failed ({status})");
    }
    say(&format!(
        "── {name}: done in {:.1} s",
        since.elapsed().as_secs_f64()
    ));
    Ok(())
}

/// Lets a program take this process's place; returns only when it cannot.
///
/// # Errors
/// When it cannot be started.
pub fn replace(name: &str, mut command: Command) -> Result<()> {
    say(&format!("── {name}"));
    let error = command.exec();
    Err(error).with_context(|| {
        format!(
            "{name}: '{}' cannot be run",
            command.get_program().display()
        )
    })
}

/// A command line as one would type it.
pub fn shown(command: &Command) -> String {
    let mut line = command.get_program().to_string_lossy().into_owned();
    for word in command.get_args() {
        line.push(' ');
        line.push_str(&word.to_string_lossy());
    }
    line
}

/// What a command prints; `None` when it fails or is not there.
pub fn output(mut command: Command) -> Option<String> {
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Looks a program up on `PATH` and where system programs lie.
pub fn find(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|folder| Path::new(&folder).join(name).is_file())
}

/// Says something to whoever watches.
#[expect(clippy::print_stdout, reason = "what is done is told")]
pub fn say(text: &str) {
    println!("{text}");
}

/// Says what went wrong.
#[expect(clippy::print_stderr, reason = "problems go to stderr")]
pub fn complain(text: &str) {
    eprintln!("xtask: {text}");
}
