//! Known issues on real VMs: what the catalogue finds there, what a host learns
//! from its errors, and what it says of it the next time.

use std::os::unix::fs::PermissionsExt as _;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use vmsnap_tests::{
    Agent, BlankSpec, Cli, Lab,
    ansible::keep,
    command::{command, run},
    paths,
};

/// The warning of a plan with this code.
fn warning<'a>(plan: &'a Cli, code: &str) -> Result<Option<&'a Value>> {
    let warnings = plan.document()?["warnings"].as_array().context("a plan")?;
    Ok(warnings.iter().find(|warning| warning["code"] == code))
}

fn issues(agent: &Agent, arguments: &[&str]) -> Result<Vec<Value>> {
    let listed = agent.vmsnap(&[&["issues", "list"], arguments].concat())?;
    let issues = listed.document()?["issues"].as_array();
    Ok(issues.context("a list")?.clone())
}

fn find<'a>(issues: &'a [Value], id: &str) -> Option<&'a Value> {
    issues.iter().find(|issue| issue["id"] == id)
}

/// What a person sees, who asks for no JSON.
fn shown(agent: &Agent, arguments: &[&str]) -> Result<String> {
    let mut vmsnap = command(paths::binary("vmsnap")?, ["--agent", &agent.address()]);
    vmsnap.args(arguments);
    let output = run(&mut vmsnap, None, std::time::Duration::from_secs(60))?;
    Ok(output.text() + &output.complaint())
}

#[test]
fn a_pool_that_was_full_is_warned_of_and_the_fix_that_worked_is_shown_until_it_is_forgotten()
-> Result<()> {
    let lab = Lab::from_env()?;
    let small = lab.small_pool("size=6m")?;
    let agent = lab.agent("")?;
    let spec = BlankSpec {
        folder: Some(small.folder.clone()),
        disk_mib: 4,
        ..BlankSpec::default()
    };
    let domain = lab.blank(&spec)?;
    let (name, pool) = (domain.name.as_str(), small.name.as_str());
    let check = ["create", name, "cold", "--check"];
    assert_eq!(warning(&agent.vmsnap(&check)?, "NO_SPACE_BEFORE")?, None);

    // Memory of 64 MiB does not fit.
    let full = ["create", name, "warm", "--memory"];
    let refused = agent.vmsnap(&full)?;
    assert_eq!(refused.failure()?["reason"], "NO_SPACE");
    assert_eq!(refused.failure()?["known_fixes"], json!([]));
    let plan = agent.vmsnap(&check)?;
    let told = warning(&plan, "NO_SPACE_BEFORE")?.context("a warning")?;
    let message = told["message"].as_str().context("message")?;
    assert!(message.contains(&format!("pool '{pool}'")), "{message}");
    assert!(message.contains("(once, at "), "{message}");
    // Another VM in another pool is not concerned.
    let other = lab.blank(&BlankSpec::default())?;
    let elsewhere = agent.vmsnap(&["create", &other.name, "cold", "--check"])?;
    assert_eq!(warning(&elsewhere, "NO_SPACE_BEFORE")?, None);

    let learned = issues(&agent, &["--vm", name])?;
    let learned = &learned[0];
    assert_eq!(learned["learned"], true);
    assert_eq!(
        (
            &learned["reason"],
            &learned["subject"],
            &learned["times_seen"]
        ),
        (&json!("NO_SPACE"), &json!(pool), &json!(1))
    );
    assert!(
        issues(&agent, &["--vm", &other.name])?
            .iter()
            .all(|it| it["learned"] == false)
    );

    let fix = "mount -o remount,size=1g";
    let recorded = agent.vmsnap(&["issues", "record", "NO_SPACE", fix, "--subject", pool])?;
    let id = recorded.document()?["id"].as_str().context("id")?;
    assert_eq!(learned["id"], id);
    // A run that is refused, a plan that is refused, a person and a play are told.
    let refused = agent.vmsnap(&full)?;
    assert_eq!(refused.failure()?["known_fixes"], json!([fix]));
    let run_id = refused.run_id()?;
    let read_back = agent.vmsnap(&["show", run_id])?;
    assert_eq!(
        read_back.document()?["failure"]["known_fixes"],
        json!([fix])
    );
    let checked = agent.vmsnap(&[&full[..], &["--check"]].concat())?;
    assert_eq!(checked.events[0]["error"]["known_fixes"], json!([fix]));
    let text = shown(&agent, &full)?;
    assert!(
        text.contains(&format!("worked here before: {fix}")),
        "{text}"
    );
    let play = format!(
        "- hosts: all\n  gather_facts: false\n  tasks:\n    - vmsnap.libvirt.vm_snapshot: {}\n      \
         register: full\n      ignore_errors: true\n{}",
        json!({"vm_name": name, "action": "create", "snapshot_name": "warm", "memory": true,
               "agent": agent.address()}),
        keep("full")
    );
    let played = lab.playbook(&play, &[])?.ok()?.kept("full")?;
    assert_eq!(played["error"]["known_fixes"], json!([fix]));
    let message = played["msg"].as_str().context("msg")?;
    assert!(
        message.contains(&format!("what worked here before: {fix}")),
        "{message}"
    );
    let plan = agent.vmsnap(&check)?;
    let told = warning(&plan, "NO_SPACE_BEFORE")?.context("a warning")?;
    let advice = told["advice"].as_str().context("advice")?;
    assert!(
        advice.contains(fix) && advice.contains(&format!("issues forget {id}")),
        "{advice}"
    );

    agent.vmsnap(&["issues", "forget", id])?.document()?;
    assert_eq!(warning(&agent.vmsnap(&check)?, "NO_SPACE_BEFORE")?, None);
    assert_eq!(agent.vmsnap(&full)?.failure()?["known_fixes"], json!([]));
    let again = agent.vmsnap(&["issues", "forget", id])?;
    assert_eq!(again.status, 1);
    assert_eq!(again.events[0]["error"]["reason"], "ISSUE_NOT_FOUND");
    Ok(())
}

#[test]
fn space_that_runs_out_in_the_middle_is_learned_of_its_pool() -> Result<()> {
    let lab = Lab::from_env()?;
    // The folder, the disk, and one file more than is planned for.
    let small = lab.small_pool("size=16m,nr_inodes=3")?;
    let agent = lab.agent("")?;
    let spec = BlankSpec {
        folder: Some(small.folder.clone()),
        disk_mib: 4,
        stopped: true,
        ..BlankSpec::default()
    };
    let domain = lab.blank(&spec)?;
    let name = domain.name.as_str();
    std::fs::write(small.folder.join("third"), "")?;
    let failed = agent.vmsnap(&["create", name, "cold"])?;
    assert_eq!(failed.outcome()?["state"], "failed", "the plan saw room");
    assert_eq!(failed.failure()?["reason"], "NO_SPACE");
    assert_eq!(failed.failure()?["metadata"]["pool"], small.name.as_str());
    let plan = agent.vmsnap(&["create", name, "cold", "--check"])?;
    assert!(warning(&plan, "NO_SPACE_BEFORE")?.is_some());

    // Growing an image needs a table that finds no room.
    std::fs::remove_file(small.folder.join("third"))?;
    small.fill()?;
    let failed = agent.vmsnap(&["commit", name, "--resize-to", "1T", "--pool", &small.name])?;
    assert_eq!(failed.outcome()?["state"], "failed");
    assert_eq!(failed.failure()?["reason"], "NO_SPACE");
    assert_eq!(failed.failure()?["metadata"]["pool"], small.name.as_str());
    let learned = issues(&agent, &[])?;
    assert_eq!(learned[0]["subject"], small.name.as_str());
    assert_eq!(learned[0]["times_seen"], 2);
    assert_eq!(learned[1]["learned"], false, "one entry for one place");
    Ok(())
}

#[test]
fn what_is_found_beforehand_is_what_is_refused_later_and_its_advice_is_right() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec {
        stopped: true,
        ..BlankSpec::default()
    })?;
    let name = domain.name.as_str();
    domain.virsh("snapshot-create-as", &["two words"])?;
    domain.virsh("start", &[])?;
    let found = issues(&agent, &["--vm", name])?;
    let issue = find(&found, "FOREIGN_NAME").context("the entry")?;
    assert!(
        issue["found"].to_string().contains("'two words'"),
        "{issue}"
    );
    let remove = ["cleanup", name, "two words"];
    let refused = agent.vmsnap(&remove)?;
    assert_eq!(refused.failure()?["reason"], "DOMAIN_STATE");
    domain.virsh("destroy", &[])?;
    let found = issues(&agent, &["--vm", name])?;
    assert!(find(&found, "FOREIGN_NAME").is_none(), "{found:?}");
    agent.vmsnap(&remove)?.result()?;
    assert_eq!(domain.snapshots()?, [] as [&str; 0]);
    Ok(())
}

#[test]
fn a_failure_in_libvirts_words_is_explained_with_what_to_do_and_what_worked_here() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let folder = lab.folder.join(format!("shut-{}", std::process::id()));
    std::fs::create_dir(&folder)?;
    lab.own(&folder)?;
    let domain = lab.blank(&BlankSpec {
        folder: Some(folder.clone()),
        stopped: true,
        ..BlankSpec::default()
    })?;
    let name = domain.name.as_str();
    let record = |fix: &str, subject: &str| {
        agent.vmsnap(&[
            "issues",
            "record",
            "STORAGE_NOT_WRITABLE",
            fix,
            "--subject",
            subject,
        ])
    };
    record("of another", "elsewhere")?.document()?;
    record("give the folder back to qemu", name)?.document()?;
    // Only libvirt finds out: it makes the overlay.
    std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o555))?;
    let failed = agent.vmsnap(&["create", name, "s"])?;
    std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o755))?;
    let failure = failed.failure()?;
    assert_eq!(failed.outcome()?["state"], "failed");
    assert_eq!(failure["reason"], "STORAGE_NOT_WRITABLE");
    assert_eq!(failure["metadata"]["known_issue"], "IMAGE_NOT_WRITABLE");
    let advice = failure["metadata"]["advice"].to_string();
    assert!(advice.contains("owner and permissions"), "{advice}");
    assert_eq!(
        failure["known_fixes"],
        json!(["give the folder back to qemu"])
    );
    // The advice is right.
    agent.vmsnap(&["create", name, "s"])?.result()?;
    assert_eq!(domain.snapshots()?, ["s"]);
    drop(domain);
    std::fs::remove_dir_all(folder)?;
    Ok(())
}

#[test]
fn what_applies_to_a_vm_is_found_on_its_own_disks_and_devices_and_warned_of_in_its_plans()
-> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let iso = lab
        .images()
        .join(format!("seed-{}.iso", std::process::id()));
    lab.write(&iso, "seed")?;
    let domain = lab.blank(&BlankSpec {
        disks: vec![("vdb".into(), "raw".into(), false)],
        devices: format!(
            "<disk type='file' device='cdrom'><source file='{}'/><target dev='sda' bus='sata'/>\
             <readonly/></disk><shmem name='{}'><model type='ivshmem-plain'/>\
             <size unit='M'>1</size></shmem>",
            iso.display(),
            format_args!("shm{}", std::process::id()),
        ),
        ..BlankSpec::default()
    })?;
    let name = domain.name.as_str();
    let found = issues(&agent, &["--vm", name])?;
    for (id, part) in [
        ("RAW_DISK", "disk vdb "),
        ("MEDIA_IN_DRIVE", "seed-"),
        ("MEMORY_NOT_SAVABLE", "shared memory device"),
        ("WAIT_WITHOUT_AGENT", name),
    ] {
        let issue = find(&found, id).with_context(|| format!("{id} in {found:?}"))?;
        assert!(issue["found"].to_string().contains(part), "{issue}");
    }
    for id in [
        "MANAGED_SAVE",
        "TRANSIENT_VM",
        "AGENT_SILENT",
        "BASE_SHARED",
    ] {
        assert_eq!(find(&found, id), None);
    }
    let plan = agent.vmsnap(&["create", name, "s", "--wait-for", "agent", "--check"])?;
    for code in ["MEDIA_IN_DRIVE", "MEMORY_NOT_SAVABLE", "WAIT_WITHOUT_AGENT"] {
        assert!(warning(&plan, code)?.is_some(), "{code}");
    }
    // One word about memory is enough.
    assert_eq!(warning(&plan, "MEMORY_NOT_SAVED")?, None);
    let text = shown(&agent, &["issues", "list", "--vm", name])?;
    assert!(
        text.contains("RAW_DISK: A disk is raw\n  found: disk vdb "),
        "{text}"
    );

    // The run tells the same as its plan, and does what it says.
    let made = agent.vmsnap(&["create", name, "s"])?;
    made.result()?;
    let planned = made.all("planned").next().context("the plan")?;
    assert!(planned.to_string().contains("MEDIA_IN_DRIVE"), "{planned}");
    domain.virsh("change-media", &["sda", "--eject"])?;
    let plan = agent.vmsnap(&["create", name, "t", "--check"])?;
    assert_eq!(warning(&plan, "MEDIA_IN_DRIVE")?, None);
    std::fs::remove_file(iso)?;
    Ok(())
}

#[test]
fn the_catalogue_is_listed_whole_and_what_makes_no_sense_is_refused_by_name() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let all = issues(&agent, &[])?;
    assert!(all.len() > 30);
    let shared = find(&all, "BASE_SHARED").context("an entry")?;
    assert_eq!(shared["reason"], "FILE_SHARED");
    assert_eq!(shared["learned"], false);
    assert_eq!(shared["found"], "");

    let recorded = agent.vmsnap(&["issues", "record", "VM_BUSY", "wait"])?;
    let id = recorded.document()?["id"].as_str().context("id")?;
    let all = issues(&agent, &[])?;
    assert_eq!(
        (&all[0]["id"], &all[0]["times_seen"]),
        (&json!(id), &json!(0))
    );
    for (words, reason, part) in [
        (vec!["list", "--vm", "nobody"], "VM_NOT_FOUND", "nobody"),
        (vec!["forget", "BASE_SHARED"], "BAD_REQUEST", "is built in"),
        (vec!["forget", "none"], "ISSUE_NOT_FOUND", "'none'"),
        (
            vec!["record", "NO_SPCAE", "x"],
            "BAD_REQUEST",
            "did you mean NO_SPACE?",
        ),
        (vec!["record", "NO_SPACE", " "], "BAD_REQUEST", "fix"),
    ] {
        let refused = agent.vmsnap(&[&["issues"], &words[..]].concat())?;
        assert_eq!(refused.status, 1, "{words:?}");
        let error = &refused.events[0]["error"];
        assert_eq!(error["reason"], reason, "{words:?}");
        assert!(error["message"].to_string().contains(part), "{error}");
    }
    Ok(())
}
