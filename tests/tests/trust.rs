//! Trust over a network, with real guests: playbooks from another machine, foreign
//! orchestrators, a flood, and names that are meant to do harm.

use std::{
    fs,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use vmsnap_client::{Client, ConnectOptions, Endpoint, Error, RunOptions, TlsFiles};
use vmsnap_proto::v1;
use vmsnap_tests::{
    BlankSpec, Lab, Network, Pki,
    ansible::{Played, keep},
    command::{self, User},
    eventually, paths,
    python::{Stubs, python},
};

/// Whoever runs the tests is an admin on the socket, so that he reads the trail.
fn roles() -> String {
    ROLES.replace("UID", &User::current().uid.to_string())
}

const ROLES: &str = "
[[roles]]
role = 'operator'
vms = ['*']
certificates = ['deploy']
[[roles]]
role = 'viewer'
vms = ['*']
certificates = ['watcher']
[[roles]]
role = 'admin'
vms = ['*']
certificates = ['root']
uids = [UID]
";

/// Far more patient than people are: on a busy machine, what is slow is not wrong.
async fn connect(address: &str, tls: TlsFiles) -> Result<Client, Error> {
    let options = ConnectOptions {
        tls,
        connect_timeout: Duration::from_secs(60),
        call_timeout: Duration::from_secs(300),
        keepalive_timeout: Duration::from_secs(120),
        ..ConnectOptions::default()
    };
    Client::connect(&Endpoint::parse(address)?, &options).await
}

/// A certificate of a CA of `vmsnap cert` that has expired, which that does not make.
fn expired(pki: &Pki, name: &str) -> Result<TlsFiles> {
    let read = |file: &str| fs::read_to_string(pki.path(file));
    let key = rcgen::KeyPair::from_pem(&read("ca.key")?)?;
    let issuer = rcgen::Issuer::from_ca_cert_pem(&read("ca.pem")?, key)?;
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params
        .distinguished_name
        .push(rcgen::DnType::CommonName, name);
    params.not_before = rcgen::date_time_ymd(2020, 1, 1);
    params.not_after = rcgen::date_time_ymd(2021, 1, 1);
    let own = rcgen::KeyPair::generate()?;
    let signed = params.signed_by(&own, &issuer)?;
    fs::write(pki.path("expired.pem"), signed.pem())?;
    fs::write(pki.path("expired.key"), own.serialize_pem())?;
    Ok(TlsFiles {
        ca_path: Some(pki.path("ca.pem")),
        client_cert: Some(pki.path("expired.pem")),
        client_key: Some(pki.path("expired.key")),
    })
}

/// How a module is told of the files.
fn options(files: &TlsFiles) -> Value {
    json!({
        "ca_path": files.ca_path, "client_cert": files.client_cert, "client_key": files.client_key,
    })
}

fn play(files: &TlsFiles, tasks: &[(&str, Value)]) -> String {
    let mut text = format!(
        "- hosts: hypervisors\n  gather_facts: false\n  module_defaults:\n    \
         group/vmsnap.libvirt.all: {}\n  tasks:\n",
        options(files)
    );
    for (name, arguments) in tasks {
        text.push_str(&format!(
            "    - vmsnap.libvirt.vm_snapshot: {arguments}\n      register: {name}\n      \
             ignore_errors: true\n"
        ));
        text.push_str(&keep(name).replace(
            &format!("/{name}.json"),
            &format!("/{name}-{{{{ inventory_hostname }}}}.json"),
        ));
    }
    text
}

#[test]
fn a_controller_drives_agents_on_two_other_machines_by_mutual_tls_and_errors_tell_what_to_do()
-> Result<()> {
    let lab = Lab::from_env()?;
    let guests = [lab.guest()?, lab.guest()?];
    let (network, pki) = (Network::new(2)?, lab.pki()?);
    let first = pki.agent("10.77.0.2:7443", &["kvm-a", "10.77.0.2"], &roles())?;
    let first = first.replace("10.77.0.2:7443", "0.0.0.0:7443");
    let second = pki.agent("[::]:7443", &["kvm-b", "fd77:1::2"], &roles())?;
    let agents = [
        lab.agent_at(&first, Some(network.machine(0)))?,
        lab.agent_at(&second, Some(network.machine(1)))?,
    ];
    let inventory = lab.folder.join(format!("hosts-{}", std::process::id()));
    fs::write(
        &inventory,
        format!(
            "[hypervisors]\nkvm-a agent=10.77.0.2:7443 vm={}\nkvm-b agent=[fd77:1::2]:7443 vm={}\n",
            guests[0].name, guests[1].name
        ),
    )?;
    let shown = inventory.display().to_string();
    let run = |text: &str, more: &[&str]| -> Result<Played> {
        let mut arguments = vec!["-i", &shown];
        arguments.extend(more);
        lab.playbook_by(text, &arguments, |command| network.on_controller(&command))?
            .ok()
    };
    let deploy = pki.person("deploy")?;
    let create = json!({"agent": "{{ agent }}", "vm_name": "{{ vm }}", "action": "create", "snapshot_name": "s", "memory": true});
    let played = run(&play(&deploy, &[("made", create)]), &[])?;
    for host in ["kvm-a", "kvm-b"] {
        let made = played.kept(&format!("made-{host}"))?;
        ensure!(made["changed"] == true, "{host}: {made}");
        assert_eq!(made["consistency"], "memory");
    }
    for guest in &guests {
        guest.exec("echo x > /data/damage; sync")?;
    }
    let revert = json!({"agent": "{{ agent }}", "vm_name": "{{ vm }}", "action": "revert", "snapshot_name": "s", "wait_for": "agent"});
    let played = run(&play(&deploy, &[("reverted", revert)]), &[])?;
    for (guest, host) in guests.iter().zip(["kvm-a", "kvm-b"]) {
        let reverted = played.kept(&format!("reverted-{host}"))?;
        ensure!(reverted["changed"] == true, "{host}: {reverted}");
        assert!(guest.exec("test ! -e /data/damage").is_ok());
        guest.lives()?;
    }

    // What cannot go well, each in its own words.
    let other = lab.pki()?;
    let wrong_ca = TlsFiles {
        ca_path: Some(other.path("ca.pem")),
        ..deploy.clone()
    };
    let with = |files: &TlsFiles, agent: &str, action: &str| {
        let mut arguments = options(files);
        arguments["agent"] = agent.into();
        arguments["vm_name"] = "{{ vm }}".into();
        arguments["action"] = action.into();
        if action == "cleanup" {
            arguments["snapshot_name"] = "s".into();
        }
        arguments
    };
    let tasks = [
        ("wrong_ca", with(&wrong_ca, "10.77.0.2:7443", "list")),
        (
            "expired",
            with(&expired(&pki, "deploy")?, "10.77.0.2:7443", "list"),
        ),
        ("foreign_name", with(&deploy, "10.77.0.22:7443", "list")),
        ("role_too_low", with(&deploy, "10.77.0.2:7443", "cleanup")),
        (
            "stranger",
            with(&pki.person("mallory")?, "10.77.0.2:7443", "list"),
        ),
        ("no_agent", with(&deploy, "10.77.0.2:7444", "list")),
        ("no_route", with(&deploy, "10.99.0.1:7443", "list")),
    ];
    let played = run(&play(&deploy, &tasks), &["--limit", "kvm-a"])?;
    let mut told = Vec::new();
    for (name, reason, words) in [
        ("wrong_ca", "NOT_TRUSTED", "no CA in ca_path signed"),
        ("expired", "NOT_TRUSTED", "client certificate has expired"),
        ("foreign_name", "NOT_TRUSTED", "is for other names"),
        (
            "role_too_low",
            "NOT_ALLOWED",
            "cleanup needs the role admin over VM",
        ),
        ("stranger", "NOT_ALLOWED", "'mallory' has no role"),
        ("no_agent", "AGENT_UNREACHABLE", "refused the connection"),
        (
            "no_route",
            "NO_ROUTE",
            "check the name, the address and the network",
        ),
    ] {
        let result = played.kept(&format!("{name}-kvm-a"))?;
        assert_eq!(result["failed"], true, "{name}: {result}");
        assert_eq!(result["error"]["reason"], reason, "{name}: {result}");
        let text = result["msg"].as_str().context("msg")?.to_owned();
        assert!(text.contains(words), "{name}: {text}");
        told.push(text);
    }
    told.sort();
    told.dedup();
    assert_eq!(told.len(), tasks.len());

    // The agents have it in their trails, by name and address.
    let trail = agents[0].vmsnap(&["audit", "-n", "100"])?;
    let entries = &trail.events;
    let by = |identity: &str, result: &str| {
        entries
            .iter()
            .filter(|entry| entry["caller"]["identity"] == identity && entry["result"] == result)
            .count()
    };
    assert_eq!(by("deploy", "done"), 2, "{entries:?}");
    assert_eq!(by("deploy", "denied"), 1, "{entries:?}");
    assert_eq!(by("mallory", "denied"), 1, "{entries:?}");
    assert!(by("unknown", "denied") >= 2, "{entries:?}");
    assert!(
        entries
            .iter()
            .filter(|entry| entry["caller"]["transport"] == "tls")
            .all(|entry| entry["caller"]["address"]
                .as_str()
                .is_some_and(|address| address.starts_with("10.77.0.1:")))
    );
    for (agent, guest) in agents.iter().zip(&guests) {
        agent.vmsnap(&["cleanup", &guest.name, "s"])?.result()?;
    }
    fs::remove_file(inventory)?;
    Ok(())
}

#[test]
fn a_foreign_orchestrator_loses_its_line_over_mutual_tls_and_joins_from_its_last_event()
-> Result<()> {
    let lab = Lab::from_env()?;
    let pki = lab.pki()?;
    let agent = lab.agent(&pki.agent("127.0.0.1:0", &["127.0.0.1", "localhost"], &roles())?)?;
    let domain = lab.blank(&BlankSpec::default())?;
    let deploy = pki.person("deploy")?;
    let stubs = Stubs::new(&lab)?;
    let path = |path: &Option<std::path::PathBuf>| {
        path.as_ref()
            .map(|path| path.display().to_string())
            .unwrap_or_default()
    };
    let script = paths::checkout().join("tests/tests/foreign_mtls.py");
    let report: Value = serde_json::from_str(&python(&[
        &script.display().to_string(),
        &agent.tls()?,
        &domain.name,
        &stubs.folder(),
        &path(&deploy.ca_path),
        &path(&deploy.client_cert),
        &path(&deploy.client_key),
    ])?)?;
    assert_eq!(report["cut"], "UNAVAILABLE", "{report}");
    assert_eq!(report["outcome"], "WORKFLOW_STATE_SUCCEEDED");
    let numbers = |key: &str| -> Vec<u64> {
        let all = report[key].as_array().into_iter().flatten();
        all.filter_map(Value::as_u64).collect()
    };
    let mut all = numbers("seen");
    all.extend(numbers("again"));
    let last = report["last"].as_u64().context("last")?;
    assert_eq!(all, (1..=last).collect::<Vec<_>>(), "{report}");
    assert_eq!(report["caller"], json!(["deploy", "tls"]));
    assert_eq!(report["denied"][0], "PERMISSION_DENIED");
    assert_eq!(domain.snapshots()?.len(), 1);
    Ok(())
}

#[test]
fn names_and_paths_that_are_meant_to_do_harm_reach_neither_shell_nor_xml_nor_other_folders()
-> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec::default())?;
    let name = domain.name.as_str();
    let trap = lab.folder.join(format!("trap-{}", std::process::id()));
    let victim = lab
        .folder
        .join(format!("victim-{}.qcow2", std::process::id()));
    lab.write(&victim, "precious")?;
    // A link in the pool's folder that leads out of it.
    let link = lab
        .images()
        .join(format!("link-{}-old.qcow2", std::process::id()));
    std::os::unix::fs::symlink(&victim, &link)?;
    let before = domain.virsh("dumpxml", &["--inactive"])?;
    let outside = format!(
        "../{}",
        victim
            .file_name()
            .and_then(|it| it.to_str())
            .context("name")?
    );
    let hostile = [
        format!("$(touch {})", trap.display()),
        format!("`touch {}`", trap.display()),
        format!("x; touch {}", trap.display()),
        "a'><disk type='file'/>".to_owned(),
        "]]><!--".to_owned(),
        "&lt;x&gt;&#0;".to_owned(),
        "../../etc/passwd".to_owned(),
        "..".to_owned(),
        "/etc/passwd".to_owned(),
        "-rf".to_owned(),
        "--help".to_owned(),
        "%s%n".to_owned(),
        "a\u{202e}b".to_owned(),
    ];
    for text in &hostile {
        for arguments in [
            vec!["create", "--", name, text],
            vec!["create", "--", text, "s"],
            vec!["revert", "--", name, text],
            vec!["commit", "--", name, text],
            vec!["cleanup", "--", name, text],
        ] {
            let ended = agent.vmsnap(&arguments)?;
            // To merge or delete what is not there is to do nothing, with a warning.
            let changed = ended.status == 0 && ended.result()?["changed"] != false;
            assert!(
                !changed && (ended.status != 0 || ["commit", "cleanup"].contains(&arguments[0])),
                "{arguments:?}: {:?}",
                ended.events
            );
            assert!(!ended.said.contains("INTERNAL"), "{}", ended.said);
        }
    }
    // A description is a text, and comes back as it was.
    let text = hostile.join(" ");
    let made = agent.vmsnap(&["create", name, "s", &format!("--description={text}")])?;
    made.result()?;
    let listed = agent.vmsnap(&["ls", name])?;
    assert_eq!(
        listed.document()?["snapshots"][0]["description"],
        text.as_str()
    );
    agent.vmsnap(&["cleanup", name, "s"])?.result()?;
    // Left-over volumes are names of the pool, and nothing else.
    let link_name = link
        .file_name()
        .and_then(|it| it.to_str())
        .context("name")?;
    for leftover in [outside.as_str(), &victim.display().to_string(), link_name] {
        agent.vmsnap(&["cleanup", name, "--leftover", leftover])?;
        assert_eq!(fs::read_to_string(&victim)?, "precious", "{leftover}");
    }
    let pooled = agent.vmsnap(&["volumes", "--", "../x"])?;
    assert_eq!(pooled.status, 1);
    assert!(!trap.exists());
    assert_eq!(domain.virsh("dumpxml", &["--inactive"])?, before);
    let _ = fs::remove_file(link);
    fs::remove_file(victim)?;
    Ok(())
}

#[test]
fn a_caller_who_sees_one_vm_learns_of_no_other_from_refusals_plans_runs_issues_and_volumes()
-> Result<()> {
    let lab = Lab::from_env()?;
    let pki = lab.pki()?;
    let domain = lab.blank(&BlankSpec::default())?;
    let name = domain.name.as_str();
    let base = domain.disk("vda")?;
    let roles = format!(
        "{}[[roles]]\nrole = 'admin'\nvms = ['{name}']\ncertificates = ['narrow']\n",
        roles()
    );
    let agent = lab.agent(&pki.agent("127.0.0.1:0", &["127.0.0.1"], &roles)?)?;
    agent.vmsnap(&["create", name, "e1"])?.result()?;
    let clone = lab.blank(&BlankSpec {
        backing: Some(base),
        ..BlankSpec::default()
    })?;
    let narrow = pki.person("narrow")?;
    let address = agent.tls()?;
    let by_narrow = |arguments: &[&str]| -> Result<String> {
        let mut command =
            command::command(paths::binary("vmsnap")?, ["--json", "--agent", &address]);
        for (option, path) in [
            ("--ca-path", &narrow.ca_path),
            ("--client-cert", &narrow.client_cert),
            ("--client-key", &narrow.client_key),
        ] {
            command.arg(option).args(path);
        }
        let output = command::run(command.args(arguments), None, Duration::from_secs(60))?;
        Ok(format!("{}{}", output.text(), output.complaint()))
    };
    // Whoever sees all is told whose chain it is.
    let told = agent.vmsnap(&["cleanup", name, "e1"])?;
    assert!(told.said.contains(&clone.name), "{}", told.said);
    let run = told.run_id()?.to_owned();
    let refused = by_narrow(&["cleanup", name, "e1"])?;
    assert!(
        refused.contains("FILE_SHARED") && refused.contains("another VM"),
        "{refused}"
    );
    for arguments in [
        &["cleanup", name, "e1"][..],
        &["cleanup", name, "e1", "--check"],
        &["commit", name, "--all", "--check"],
        &["watch", &run],
        &["show", &run],
        &["log"],
        &["log", &run],
        &["issues", "list", "--vm", name],
        &["issues", "list"],
        &["volumes"],
        &["ls"],
        &["ls", name],
        &["show", &clone.name[..clone.name.len() - 1]],
    ] {
        let said = by_narrow(arguments)?;
        assert!(!said.contains(&clone.name), "{arguments:?}: {said}");
        assert!(!said.contains("INTERNAL:"), "{arguments:?}: {said}");
    }
    assert!(by_narrow(&["ls"])?.contains(name));
    assert!(by_narrow(&["volumes"])?.contains(name));
    drop(clone);
    agent.vmsnap(&["cleanup", name, "e1"])?.result()?;
    Ok(())
}

#[test]
fn a_role_that_is_withdrawn_ends_who_watches_by_it_and_the_run_goes_on() -> Result<()> {
    const SOON: Duration = Duration::from_secs(15);
    let lab = Lab::from_env()?;
    let (pki, domain) = (lab.pki()?, lab.blank(&BlankSpec::default())?);
    let vm = domain.name.clone();
    let configuration = pki.agent("127.0.0.1:0", &["127.0.0.1"], &roles())?;
    let mut agent = lab.agent(&format!("{configuration}[limits]\nheartbeat = 1\n"))?;
    let go = agent.folder().join("go");
    agent.stop();
    agent.set_env(
        "FAILPOINTS",
        &format!("journal.record=1*off->return(wait {})", go.display()),
    );
    agent.start()?;
    let address = agent.tls()?;
    let set_roles = |text: &str| lab.write(&pki.path("127.0.0.1.roles"), text);
    let role = |role: &str, vms: &str, name: &str| {
        format!("[[roles]]\nrole = '{role}'\nvms = ['{vms}']\ncertificates = ['{name}']\n")
    };
    let local = roles()
        .replace("'deploy'", "'other'")
        .replace("'watcher'", "'other'");
    let (deploy, watcher) = (pki.person("deploy")?, pki.person("watcher")?);
    tokio::runtime::Runtime::new()?.block_on(async {
        let [deploy, watcher] = [
            connect(&address, deploy).await?,
            connect(&address, watcher).await?,
        ];
        let spec = v1::WorkflowSpec {
            vm_name: vm.clone(),
            snapshot_name: "s".into(),
            action: v1::Action::Create.into(),
            ..v1::WorkflowSpec::default()
        };
        let mut run = deploy.run(spec, RunOptions::default());
        run.next().await?.context("a first event")?;
        let id = run.workflow_id().context("its id")?.to_owned();
        let mut watching = watcher.watch(&id, 1, SOON);
        watching.next().await?.context("an event")?;

        // Who still sees the VM goes on, with whatever role and whatever else he saw.
        set_roles(&format!(
            "{local}{}{}",
            role("viewer", &vm, "watcher"),
            role("viewer", "*", "deploy")
        ))?;
        eventually(SOON, "the new roles", || {
            agent.log().contains("new roles are in force")
        })?;
        for stream in [&mut run, &mut watching] {
            let ended = tokio::time::timeout(Duration::from_millis(500), stream.next()).await;
            ensure!(ended.is_err(), "{ended:?}");
        }
        set_roles(&format!("{local}{}", role("viewer", &vm, "watcher")))?;
        let ended = tokio::time::timeout(SOON, run.next()).await?;
        let error = ended.err().context("the run's own stream goes on")?;
        let failure = error.failure().context("no reason")?;
        assert_eq!(failure.reason, "NOT_ALLOWED");
        ensure!(
            failure.message.ends_with("the run itself goes on"),
            "{}",
            failure.message
        );
        set_roles(&format!("{local}{}", role("viewer", "else*", "watcher")))?;
        let ended = tokio::time::timeout(SOON, watching.next()).await?;
        let error = ended.err().context("a watcher's stream goes on")?;
        let failure = error.failure().context("no reason")?;
        assert_eq!(failure.reason, "NOT_ALLOWED");
        assert_eq!(failure.metadata["vm"], vm);

        lab.write(&go, "")?;
        let show = || agent.vmsnap(&["show", &id]);
        let patience = Instant::now() + SOON;
        while show()?.document()?["state"] != "succeeded" {
            ensure!(Instant::now() < patience, "{:?}", show()?.events);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        anyhow::Ok(())
    })?;
    assert_eq!(domain.snapshots()?, ["s"]);
    let trail = agent.vmsnap(&["audit", "--denied"])?;
    for (identity, method) in [("deploy", "RunWorkflow"), ("watcher", "WatchWorkflow")] {
        ensure!(
            trail.events.iter().any(|entry| {
                entry["caller"]["identity"] == identity && entry["method"] == method
            }),
            "{:?}",
            trail.events
        );
    }
    Ok(())
}

/// Some seconds, or with `VMSNAP_TEST_LONG` in the environment a minute.
fn while_it_lasts() -> Duration {
    match std::env::var_os("VMSNAP_TEST_LONG") {
        Some(_) => Duration::from_secs(60),
        None => Duration::from_secs(8),
    }
}

/// Runs a snapshot with memory and its clean-up; how long they took at the agent,
/// and for who asked for them.
fn timed(agent: &vmsnap_tests::Agent, vm: &str, name: &str) -> Result<(Duration, Duration)> {
    let begun = Instant::now();
    let mut ran = Duration::ZERO;
    for arguments in [
        &["create", vm, name, "--memory"][..],
        &["cleanup", vm, name],
    ] {
        let ended = agent.vmsnap(arguments)?;
        ended.result()?;
        let run = agent.vmsnap(&["show", ended.run_id()?])?;
        let time = |key: &str| -> Result<jiff::Timestamp> {
            let text = run.document()?[key].as_str().context("a time")?;
            Ok(text.parse()?)
        };
        ran += Duration::try_from(time("finished")?.duration_since(time("started")?))?;
    }
    Ok((ran, begun.elapsed()))
}

/// What the callers of a flood were told.
#[derive(Debug, Default)]
struct Told {
    served: AtomicU64,
    limited: AtomicU64,
    denied: AtomicU64,
    other: Mutex<Vec<String>>,
}

impl Told {
    fn note(&self, result: Result<(), Error>) {
        let counter = match result {
            Ok(()) => &self.served,
            Err(Error::Failed(failure)) if failure.reason == "LIMIT_REACHED" => &self.limited,
            Err(Error::Failed(failure)) if failure.reason == "NOT_ALLOWED" => &self.denied,
            Err(error) => {
                if let Ok(mut other) = self.other.lock() {
                    other.push(error.chain());
                }
                return;
            }
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether some were served, some told that it is too much, and some denied.
    fn all_kinds(&self) -> bool {
        [&self.served, &self.limited, &self.denied]
            .iter()
            .all(|counter| counter.load(Ordering::Relaxed) > 0)
    }
}

#[test]
fn a_flood_of_a_thousand_callers_leaves_a_run_its_time_and_the_agent_its_size() -> Result<()> {
    const CALLERS: usize = 1_000;
    let lab = Lab::from_env()?;
    let (guest, pki) = (lab.guest()?, lab.pki()?);
    let agent = lab.agent(&pki.agent("127.0.0.1:0", &["127.0.0.1"], &roles())?)?;
    let (usual, usual_wait) = timed(&agent, &guest.name, "before")?;
    let before = agent.memory()?;
    let (address, vm) = (agent.tls()?, guest.name.clone());
    let callers = [pki.person("watcher")?, pki.person("mallory")?];
    let (stop, told) = (Arc::new(AtomicBool::new(false)), Arc::new(Told::default()));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        // These callers are on other machines, whose processors are not the agent's.
        .on_thread_start(|| {
            let _ = rustix::process::nice(10);
        })
        .enable_all()
        .build()?;
    let mut flood = Vec::new();
    for at in 0..CALLERS {
        let (address, vm, files) = (address.clone(), vm.clone(), callers[at % 10 / 9].clone());
        let (stop, told) = (stop.clone(), told.clone());
        flood.push(runtime.spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                let Ok(client) = connect(&address, files.clone()).await else {
                    tokio::time::sleep(Duration::from_millis(200)).await;
                    continue;
                };
                while !stop.load(Ordering::Relaxed) {
                    told.note(match fastrand::u8(0..4) {
                        0 => client.vms().await.map(drop),
                        1 => client.vm(&vm).await.map(drop),
                        2 => client.confirm(&vm, "s").await.map(drop),
                        _ => {
                            let all = v1::ListWorkflowsRequest::default();
                            client.workflows(all, 100).await.map(drop)
                        }
                    });
                }
            }
        }));
    }
    // How long it takes until they are in is a matter of the machine.
    let flooded = eventually(Duration::from_secs(180), "flood", || told.all_kinds());
    ensure!(flooded.is_ok(), "{told:?}");
    let (begun, mut most) = (Instant::now(), before);
    let mut runs = Vec::new();
    while begun.elapsed() < while_it_lasts() || runs.len() < 3 {
        runs.push(timed(
            &agent,
            &guest.name,
            &format!("during{}", runs.len()),
        )?);
        most = most.max(agent.memory()?);
    }
    stop.store(true, Ordering::Relaxed);
    for caller in flood {
        caller.abort();
    }
    runtime.shutdown_timeout(Duration::from_secs(5));
    let figures = format!(
        "usual {usual:?} (with the way {usual_wait:?}), under the flood {runs:?}; memory \
         {before} before, {most} at most; {told:?}"
    );
    fs::write(paths::kept().join("flood.txt"), &figures).ok();
    assert!(most < 256 << 20, "{figures}");
    // A flood that holds runs up holds all of them up; what else the machine does, one.
    let quickest = runs.iter().map(|(ran, _)| *ran).min().context("a run")?;
    assert!(quickest < usual * 3 + Duration::from_secs(10), "{figures}");
    let other = told
        .other
        .lock()
        .map(|other| other.clone())
        .unwrap_or_default();
    assert!(other.is_empty(), "{:?}", &other[..other.len().min(5)]);
    assert!(!agent.log().contains("panicked"));
    guest.lives()
}
