//! An operator's view of an agent that does real work: what is measured and
//! scraped by a real Prometheus, what health and the log say of a run that is
//! stuck and of a libvirt that hangs.

use std::{
    collections::BTreeMap,
    fs,
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;
use vmsnap_tests::{
    Agent, BlankSpec, Lab, OwnedLab,
    command::{end, signal},
    eventually, eventually_some, http, paths,
    ports::quiet_port,
};

const LONG: Duration = Duration::from_secs(60);
const METRICS: &str = "[metrics]\nlisten = \"127.0.0.1:0\"\n";

/// Where an agent's metrics are read.
fn metrics_of(agent: &Agent) -> Result<String> {
    let log = agent.log();
    let address = log
        .rsplit("metrics=")
        .next()
        .and_then(|rest| rest.split_whitespace().next());
    Ok(address.context("the log names no address")?.to_owned())
}

/// The value of one series of a scrape.
fn value(scrape: &str, series: &str) -> Option<f64> {
    scrape
        .lines()
        .find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
}

/// Names and kinds of the metrics in the documentation.
fn documented() -> Result<BTreeMap<String, String>> {
    let page = fs::read_to_string(paths::checkout().join("docs/metrics.md"))?;
    let rows: BTreeMap<String, String> = page
        .lines()
        .filter_map(|line| {
            let mut cells = line.strip_prefix("| `")?.split(" | ");
            Some((
                cells.next()?.trim_end_matches('`').to_owned(),
                cells.next()?.to_owned(),
            ))
        })
        .collect();
    ensure!(rows.len() > 20, "{} metrics are documented", rows.len());
    Ok(rows)
}

/// A Prometheus with the product's rules that reads one agent; ended when dropped.
struct Prometheus {
    child: Child,
    address: String,
}

impl Prometheus {
    fn start(lab: &Lab, agent: &Agent) -> Result<Self> {
        let folder = agent.folder();
        let rules = folder.join("rules.yml");
        let packaged = paths::checkout().join("packaging/prometheus/vmsnap.rules.yml");
        lab.write(&rules, &fs::read_to_string(packaged)?)?;
        let configuration = folder.join("prometheus.yml");
        lab.write(
            &configuration,
            &format!(
                "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\n\
                 rule_files: [{}]\n\
                 scrape_configs: [{{job_name: vmsnap, static_configs: [{{targets: ['{}']}}]}}]\n",
                rules.display(),
                metrics_of(agent)?
            ),
        )?;
        let address = format!("127.0.0.1:{}", quiet_port()?);
        let log = fs::File::create(folder.join("prometheus.log"))?;
        let child = lab
            .command(paths::program("prometheus").context("prometheus is not installed")?)
            .arg(format!("--config.file={}", configuration.display()))
            .arg(format!(
                "--storage.tsdb.path={}",
                folder.join("tsdb").display()
            ))
            .arg(format!("--web.listen-address={address}"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("prometheus cannot be started")?;
        Ok(Self { child, address })
    }

    fn ask(&self, path: &str) -> Result<Value> {
        let answer: Value = serde_json::from_str(&http::get(&self.address, path)?)?;
        ensure!(answer["status"] == "success", "{answer}");
        Ok(answer["data"].clone())
    }

    /// The series that a query gives now.
    fn query(&self, query: &str) -> Result<Value> {
        let escaped: String = query
            .bytes()
            .map(|byte| match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' => char::from(byte).to_string(),
                other => format!("%{other:02X}"),
            })
            .collect();
        let data = self.ask(&format!("/api/v1/query?query={escaped}"))?;
        Ok(data["result"].clone())
    }

    /// The state of an alert; `None` when it is silent.
    fn alert(&self, name: &str) -> Result<Option<String>> {
        let data = self.ask("/api/v1/alerts")?;
        let alerts = data["alerts"].as_array().context("alerts")?;
        Ok(alerts
            .iter()
            .find(|alert| alert["labels"]["alertname"] == name)
            .and_then(|alert| alert["state"].as_str())
            .map(str::to_owned))
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        end(&mut self.child, Duration::from_secs(10));
    }
}

#[test]
fn a_real_prometheus_reads_every_metric_and_its_rules_alert_of_a_run_that_is_stuck() -> Result<()> {
    let lab = Lab::from_env()?;
    let domain = lab.blank(&BlankSpec::default())?;
    let mut agent = lab.agent(METRICS)?;
    let name = domain.name.as_str();
    agent
        .vmsnap(&["create", name, "s1", "--memory"])?
        .result()?;
    agent.vmsnap(&["create", name, "s2"])?.result()?;
    agent.vmsnap(&["revert", name, "none"])?.failure()?;
    assert_eq!(
        agent.vmsnap(&["health"])?.document()?["problems"],
        Value::Array(vec![])
    );

    let address = metrics_of(&agent)?;
    let scrape = http::get(&address, "/metrics")?;
    for (metric, kind) in documented()? {
        let line = format!("# TYPE {metric} {kind}");
        assert!(
            scrape.lines().any(|it| it == line),
            "no {line} in\n{scrape}"
        );
    }
    let told: usize = scrape
        .lines()
        .filter(|line| line.starts_with("# TYPE"))
        .count();
    assert_eq!(
        told,
        documented()?.len(),
        "undocumented metrics in\n{scrape}"
    );
    let read = |series: &str| value(&scrape, series);
    let runs = |action: &str, result: &str| {
        read(&format!(
            "vmsnap_runs_total{{action=\"{action}\",result=\"{result}\"}}"
        ))
    };
    assert_eq!(runs("create", "succeeded"), Some(2.0));
    assert_eq!(runs("revert", "refused"), Some(1.0));
    assert_eq!(runs("commit", "stuck"), Some(0.0));
    assert_eq!(
        read(&format!("vmsnap_chain_depth{{vm=\"{name}\"}}")),
        Some(3.0)
    );
    assert_eq!(read("vmsnap_hypervisor_up"), Some(1.0));
    assert_eq!(read("vmsnap_journal_usable"), Some(1.0));
    assert_eq!(read("vmsnap_runs_open"), Some(0.0));
    assert_eq!(read("vmsnap_holds_open{hold=\"suspended\"}"), Some(0.0));
    assert!(read("vmsnap_journal_bytes") > Some(10_000.0));
    assert!(read("vmsnap_pool_available_bytes{pool=\"default\"}") > Some(0.0));
    assert!(
        read("vmsnap_step_seconds_count{step=\"create-snapshot\",result=\"done\"}") > Some(1.0)
    );
    assert_eq!(http::request("GET", &address, "/")?.0, 404);
    assert_eq!(http::request("POST", &address, "/metrics")?.0, 405);

    // A guest that cannot be let go.
    agent.stop();
    agent.set_env("FAILPOINTS", "effect.resume=return(before)");
    agent.start()?;
    let stuck = agent.vmsnap(&["create", name, "s3", "--consistency", "suspend"])?;
    let run = stuck.run_id()?.to_owned();
    assert_eq!(stuck.outcome()?["state"], "stuck", "{}", stuck.said);
    assert_eq!(domain.state()?, "paused");
    let health = agent.vmsnap(&["health"])?;
    assert_eq!(health.status, 1);
    let problems = health.events[0]["problems"].clone();
    for (at, kind) in ["guest_held", "run_stuck"].into_iter().enumerate() {
        assert_eq!(problems[at]["kind"], kind, "{problems}");
        assert_eq!(problems[at]["urgent"], true);
        assert_eq!(problems[at]["vm_name"], name);
        assert_eq!(problems[at]["workflow_id"], run);
    }
    // Every line of the run names it and its VM, those of the calls to libvirt too.
    let log = agent.log();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains(&run)).collect();
    let mark = format!("run{{run={run} vm={name} action=\"create\"");
    assert!(lines.iter().all(|line| line.contains(&mark)), "{lines:#?}");
    let within = |words: &[&str]| {
        lines
            .iter()
            .any(|line| words.iter().all(|word| line.contains(word)))
    };
    assert!(within(&[
        "effect begins",
        "step{step=\"suspend the VM",
        "operation=\"suspend\""
    ]));
    assert!(within(&["ERROR", "run ends: a run is stuck"]), "{lines:#?}");
    assert!(within(&["WARN", "undoing failed"]), "{lines:#?}");

    let prometheus = Prometheus::start(&lab, &agent)?;
    eventually_some(LONG, "alert of the stuck run", || {
        Ok(prometheus
            .alert("VmsnapRunStuck")?
            .filter(|state| state == "firing"))
    })?;
    let targets = prometheus.ask("/api/v1/targets")?;
    assert_eq!(targets["activeTargets"][0]["health"], "up", "{targets}");
    let rules = prometheus.ask("/api/v1/rules")?;
    let rules = rules["groups"][0]["rules"].as_array().context("rules")?;
    assert!(rules.len() > 10);
    for rule in rules {
        assert_eq!(rule["type"], "alerting");
        // Those that were not evaluated yet are "unknown", broken ones "err".
        assert_ne!(rule["health"], "err", "{rule}");
    }
    assert_eq!(prometheus.alert("VmsnapHypervisorUnreachable")?, None);
    let asked = prometheus.query("vmsnap_holds_open{hold=\"suspended\"}")?;
    assert_eq!(asked[0]["value"][1], "1", "{asked}");
    // Every panel asks what this Prometheus understands, and gets an answer unless
    // it asks for a rate, for which there is too little yet.
    let dashboard = paths::checkout().join("packaging/grafana/vmsnap.json");
    let dashboard: Value = serde_json::from_str(&fs::read_to_string(dashboard)?)?;
    let mut asked = 0;
    for panel in dashboard["panels"].as_array().context("panels")? {
        for target in panel["targets"].as_array().into_iter().flatten() {
            let query = target["expr"].as_str().context("expr")?;
            let query = query.replace("$instance", ".*");
            let answer = prometheus.query(&query).with_context(|| query.clone())?;
            let of_time = query.contains("rate(") || query.contains("increase(");
            let series = answer.as_array().map_or(0, Vec::len);
            assert!(series > 0 || of_time, "{query} has no answer");
            asked += 1;
        }
    }
    assert!(asked > 20, "{asked} queries");

    domain.virsh("resume", &[])?;
    agent
        .vmsnap(&["resolve", &run, "--note", "resumed by hand"])?
        .document()?;
    assert_eq!(agent.vmsnap(&["health"])?.status, 0);
    eventually(LONG, "end of the alert", || {
        prometheus
            .alert("VmsnapRunStuck")
            .is_ok_and(|alert| alert.is_none())
    })?;
    agent.kill();
    eventually_some(LONG, "word of the agent's end", || {
        prometheus.alert("VmsnapAgentDown")
    })?;
    Ok(())
}

#[test]
fn a_scrape_and_health_answer_while_libvirt_hangs_and_say_since_when_it_is_gone() -> Result<()> {
    let mut owned = OwnedLab::start(0)?;
    let agent = owned.lab.agent(METRICS)?;
    let address = metrics_of(&agent)?;
    let scrape = || http::get(&address, "/metrics");
    assert_eq!(value(&scrape()?, "vmsnap_hypervisor_up"), Some(1.0));
    let libvirtd = owned.libvirtd().context("libvirtd")?;
    signal(libvirtd, Signal::STOP);
    let mut caller = agent
        .cli(&["ls"])?
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let hung = (|| {
        eventually(LONG, "a call in flight", || {
            let text = scrape();
            text.is_ok_and(|text| value(&text, "vmsnap_calls_in_flight") >= Some(1.0))
        })?;
        let since = Instant::now();
        scrape()?;
        // libvirt's own answer would take half a minute.
        ensure!(
            since.elapsed() < Duration::from_secs(15),
            "{:?}",
            since.elapsed()
        );
        agent.vmsnap(&["health"]).map(drop)
    })();
    signal(libvirtd, Signal::KILL);
    end(&mut caller, Duration::from_secs(30));
    hung?;
    let gone = eventually_some(LONG, "health that knows", || {
        let health = agent.vmsnap(&["health"])?;
        Ok((health.status == 1).then_some(health))
    })?;
    let problem = &gone.events[0]["problems"][0];
    assert_eq!(problem["kind"], "hypervisor_unreachable");
    assert!(problem["since"].is_string(), "{problem}");
    assert_eq!(value(&scrape()?, "vmsnap_hypervisor_up"), Some(0.0));
    eventually(LONG, "its end", || owned.libvirtd_ended())?;
    owned.start_libvirtd()?;
    eventually(LONG, "the way back", || {
        agent
            .vmsnap(&["health"])
            .is_ok_and(|health| health.status == 0)
    })?;
    let text = scrape()?;
    assert!(
        value(&text, "vmsnap_reconnects_total") >= Some(1.0),
        "{text}"
    );
    // An outage is told once, not at every try.
    let told = agent
        .log()
        .matches("the connection to libvirt is down")
        .count();
    assert_eq!(told, 1);
    Ok(())
}
