//! The demo: the main job as a playbook on a real guest, with each step's events
//! as they come.

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead as _, BufReader},
    process::{Child, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use comfy_table::Table;
use serde_json::Value;
use vmsnap_tests::{
    Agent, OwnedLab,
    ansible::tool,
    command::{command, end, succeed},
    paths,
    wait::interrupted,
};

/// Runs it.
///
/// # Errors
/// When a step of it fails.
pub fn run() -> Result<u8> {
    let began = Instant::now();
    say("A private libvirt daemon and a guest are started ...");
    let owned = OwnedLab::start(1)?;
    let lab = &owned.lab;
    let guest = lab.guest()?;
    say(&format!(
        "Guest '{}' runs on real QEMU after {:.0} s; its agent answers.",
        guest.name,
        began.elapsed().as_secs_f64()
    ));
    let agent = lab.agent("")?;
    say(&format!("vmsnap-agent serves on {}", agent.address()));
    let kept = lab.folder.join("demo");
    fs::create_dir(&kept)?;
    // One line for the shell that the playbook's own tasks use: ssh into the
    // guest, as an administrator would.
    let in_guest = format!(
        "ssh -i {} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR -p {} root@127.0.0.1",
        own_key(&owned)?,
        guest.ssh_port
    );
    let mut playbook = tool("ansible-playbook");
    playbook
        .args(["-i", "localhost,", "-c", "local"])
        .arg("-e")
        .arg(serde_json::to_string(&serde_json::json!({
            "agent": agent.address(), "vm": guest.name, "in_guest": in_guest, "kept": kept,
            "ansible_python_interpreter": paths::python_tool("python3"),
        }))?)
        .arg(paths::checkout().join("tests/demo/playbook.yml"))
        // What ansible-core leaves when it is interrupted goes with the lab.
        .env("TMPDIR", &kept)
        .stdin(Stdio::null());
    let mut child = playbook.spawn().context("ansible-playbook cannot be run")?;
    let over = Arc::new(AtomicBool::new(false));
    let follower = follow(&agent, over.clone());
    let status = wait(&mut child)?;
    over.store(true, Ordering::Relaxed);
    // The last events may still be on their way.
    let _ = follower.join();
    let Some(success) = status else {
        say("Interrupted: everything is taken down.");
        return Ok(130);
    };
    ensure!(success, "the playbook failed");
    table(&fs::read_to_string(kept.join("happened.json"))?)?;
    guest.lives()?;
    say(&format!(
        "The guest runs and its counter grows. Done in {:.0} s; everything is taken down.",
        began.elapsed().as_secs_f64()
    ));
    Ok(0)
}

/// The guest's key as a file of whoever runs this: ssh refuses another's.
fn own_key(owned: &OwnedLab) -> Result<String> {
    let path = owned.lab.folder.join("demo-key");
    fs::write(&path, fs::read(owned.lab.folder.join("key"))?)?;
    succeed(&mut command("chmod", ["600".as_ref(), path.as_os_str()]))?;
    Ok(path.display().to_string())
}

fn wait(child: &mut Child) -> Result<Option<bool>> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status.success()));
        }
        if interrupted() {
            end(child, Duration::from_secs(10));
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// Shows the events of every run of the agent, as `vmsnap watch` does.
fn follow(agent: &Agent, over: Arc<AtomicBool>) -> thread::JoinHandle<()> {
    let (address, program) = (agent.address(), paths::binary("vmsnap"));
    thread::spawn(move || {
        let Ok(program) = program else { return };
        let mut seen = BTreeSet::new();
        while !over.load(Ordering::Relaxed) {
            let list = command(&program, ["--json", "--agent", &address, "log"]).output();
            let runs = list
                .ok()
                .and_then(|output| serde_json::from_slice::<Value>(&output.stdout).ok());
            let mut ids: Vec<String> = Vec::new();
            if let Some(runs) = runs {
                collect(&runs, &mut ids);
            }
            for id in ids {
                if !seen.insert(id.clone()) {
                    continue;
                }
                let watch = command(&program, ["--agent", &address, "watch", &id])
                    .stdin(Stdio::null())
                    .stdout(Stdio::piped())
                    .stderr(Stdio::null())
                    .spawn();
                let Ok(mut watch) = watch else { continue };
                if let Some(lines) = watch.stdout.take() {
                    for line in BufReader::new(lines).lines().map_while(Result::ok) {
                        say(&format!("    | {line}"));
                    }
                }
                let _ = watch.wait();
            }
            thread::sleep(Duration::from_millis(100));
        }
    })
}

/// Ids of runs, oldest first.
fn collect(value: &Value, ids: &mut Vec<String>) {
    let list = value.as_array().or_else(|| value["workflows"].as_array());
    let found = list
        .into_iter()
        .flatten()
        .filter_map(|run| run["id"].as_str());
    ids.extend(found.map(str::to_owned));
    ids.reverse();
}

fn table(text: &str) -> Result<()> {
    let happened: Value = serde_json::from_str(text)?;
    let mut table = Table::new();
    table.set_header([
        "what",
        "changed",
        "consistency",
        "guest stood still",
        "guest was frozen",
    ]);
    let millis = |value: &Value| {
        value
            .as_f64()
            .map_or_else(|| "-".to_owned(), |ms| format!("{ms} ms"))
    };
    for (what, result) in happened.as_object().context("a table of results")? {
        table.add_row([
            what.clone(),
            if result["changed"] == true {
                "yes"
            } else {
                "no"
            }
            .to_owned(),
            result["consistency"].as_str().unwrap_or("-").to_owned(),
            millis(&result["stop_ms"]),
            millis(&result["freeze_ms"]),
        ]);
    }
    say(&table.to_string());
    Ok(())
}

#[expect(clippy::print_stdout, reason = "the demo shows what happens")]
fn say(text: &str) {
    println!("{text}");
}
