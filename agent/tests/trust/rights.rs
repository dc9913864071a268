//! The table of rights, whole: every call and every action, with every role, on a
//! VM inside and outside the role's pattern.

use tonic::transport::Channel;
use vmsnap_agent::trust::{
    Deed, Role,
    rights::{Needs, RIGHTS},
};
use vmsnap_client::Client;
use vmsnap_proto::v1;

use crate::{
    agent::{Agent, connect},
    calls::{Answer, call, call_health, plan, run, spec},
    pki::NOW,
};

const ROLES: &str = "
[[roles]]
role = 'viewer'
vms = ['in*']
certificates = ['viewer']
[[roles]]
role = 'operator'
vms = ['in*']
certificates = ['operator']
[[roles]]
role = 'admin'
vms = ['in*']
certificates = ['admin']
[[roles]]
role = 'viewer'
vms = ['in*']
certificates = ['mixed']
[[roles]]
role = 'admin'
vms = ['else*']
certificates = ['mixed']
[[roles]]
role = 'admin'
vms = ['*']
certificates = ['root']
";

/// What a call may come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// It was let through, whatever it came to.
    Allowed,
    Denied,
    /// As for what is not there.
    Hidden,
}

fn verdict(answer: &Answer) -> Verdict {
    match answer.reason().as_str() {
        "NOT_ALLOWED" => Verdict::Denied,
        "VM_NOT_FOUND" | "WORKFLOW_NOT_FOUND" => Verdict::Hidden,
        _ => Verdict::Allowed,
    }
}

/// The run that a list of a VM made.
async fn listed(channel: &Channel, vm: &str, request_id: &str) -> String {
    let answer = run(channel, Deed::List, vm, request_id).await;
    let id = answer.text.split("workflow_id: \"").nth(1);
    let id = id.and_then(|rest| rest.split('"').next());
    id.unwrap_or_else(|| panic!("no run: {answer:?}"))
        .to_owned()
}

/// A caller with his role inside the pattern, and the highest that he has anywhere,
/// with which the gate lets him try; none for one without any.
struct Caller {
    name: &'static str,
    role: Option<Role>,
    highest: Option<Role>,
    channel: Channel,
    _client: Client,
}

async fn callers(agent: &Agent) -> Vec<Caller> {
    let mut all = Vec::new();
    for (name, role, highest) in [
        ("nobody", None, None),
        ("viewer", Some(Role::Viewer), Some(Role::Viewer)),
        ("operator", Some(Role::Operator), Some(Role::Operator)),
        ("admin", Some(Role::Admin), Some(Role::Admin)),
        ("mixed", Some(Role::Viewer), Some(Role::Admin)),
    ] {
        let client = agent.client(name).await;
        all.push(Caller {
            name,
            role,
            highest,
            channel: client.channel(),
            _client: client,
        });
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn every_call_and_action_with_every_role_inside_and_outside_its_pattern_is_as_the_table_says()
{
    let agent = Agent::start(ROLES, "");
    let root = agent.client("root").await.channel();
    let (inside, outside) = (
        listed(&root, "in1", "").await,
        listed(&root, "out1", "").await,
    );
    for caller in callers(&agent).await {
        let own = match caller.role {
            Some(_) => listed(&caller.channel, "in1", "").await,
            None => String::new(),
        };
        for right in RIGHTS {
            let mut cases = vec![
                ("in1", inside.as_str(), false),
                ("out1", outside.as_str(), false),
            ];
            if !own.is_empty() {
                cases.push(("in1", own.as_str(), true));
            }
            for (vm, id, is_own) in cases {
                let is_inside = vm == "in1";
                let over = |role: Role| match caller.role {
                    None => Verdict::Denied,
                    // Turned away at the gate already, or as what is not there: neither
                    // tells whether the VM is there.
                    Some(_) if !is_inside && caller.highest < Some(role) => Verdict::Denied,
                    Some(_) if !is_inside => Verdict::Hidden,
                    Some(has) if has < role => Verdict::Denied,
                    Some(_) => Verdict::Allowed,
                };
                let wanted = match right.needs {
                    Needs::Seeing => caller.role.map_or(Verdict::Denied, |_| Verdict::Allowed),
                    Needs::Over(role) => over(role),
                    Needs::Plan => over(Role::Viewer),
                    Needs::Action => over(Deed::List.needs()),
                    Needs::Run(mine, others) => {
                        // The gate knows only the lower one.
                        match over(if is_own { mine } else { others }) {
                            Verdict::Denied if !is_inside && caller.highest >= Some(mine) => {
                                Verdict::Hidden
                            }
                            verdict => verdict,
                        }
                    }
                    // Nobody here has a role over all VMs.
                    Needs::Host(_) => Verdict::Denied,
                };
                let answer = call(&caller.channel, right.service, right.method, vm, id).await;
                assert_eq!(
                    verdict(&answer),
                    wanted,
                    "{}.{} by {} on {vm} (own run: {is_own}): {answer:?}",
                    right.service,
                    right.method,
                    caller.name
                );
                if right.needs == Needs::Seeing {
                    assert!(
                        !answer.text.contains("out1"),
                        "{} shows {} what is hidden: {}",
                        right.method,
                        caller.name,
                        answer.text
                    );
                }
            }
        }
        for deed in Deed::ALL {
            for vm in ["in1", "out1"] {
                let wanted = match caller.role {
                    None => Verdict::Denied,
                    Some(_) if vm == "out1" => Verdict::Hidden,
                    Some(has) if has < deed.needs() || deed.needs_all() => Verdict::Denied,
                    Some(_) => Verdict::Allowed,
                };
                let answer = run(&caller.channel, deed, vm, "").await;
                assert_eq!(
                    verdict(&answer),
                    wanted,
                    "{deed} by {} on {vm}: {answer:?}",
                    caller.name
                );
            }
        }
    }
    // Over all VMs everything is allowed, and everything is seen.
    for right in RIGHTS {
        let answer = call(&root, right.service, right.method, "out1", &outside).await;
        assert_eq!(verdict(&answer), Verdict::Allowed, "{answer:?}");
    }
    for deed in Deed::ALL {
        let answer = run(&root, deed, "out1", "").await;
        assert_eq!(verdict(&answer), Verdict::Allowed, "{deed}: {answer:?}");
    }
    let seen = call(&root, "InventoryService", "ListVms", "", "").await;
    assert!(seen.text.contains("out1") && seen.text.contains("in1"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_caller_may_not_see_is_answered_in_the_words_for_what_is_not_there() {
    let agent = Agent::start(ROLES, "");
    let root = agent.client("root").await.channel();
    let admin = agent.client("admin").await.channel();
    let hidden = listed(&root, "out1", "shared-id").await;
    let nowhere = "0199f3a2-7c11-7d3e-9a55-0123456789ab";
    for (service, method) in [
        ("WorkflowService", "PlanWorkflow"),
        ("WorkflowService", "RunWorkflow"),
        ("WorkflowService", "WatchWorkflow"),
        ("WorkflowService", "GetWorkflow"),
        ("WorkflowService", "CancelWorkflow"),
        ("WorkflowService", "ResolveWorkflow"),
        ("WorkflowService", "ConfirmWorkflow"),
        ("InventoryService", "GetVm"),
    ] {
        let there = call(&admin, service, method, "out1", &hidden).await;
        let absent = call(&admin, service, method, "out9", nowhere).await;
        let words = |answer: &Answer, vm: &str, id: &str| {
            answer.message().replace(vm, "VM").replace(id, "ID")
        };
        assert_eq!(
            words(&there, "out1", &hidden),
            words(&absent, "out9", nowhere),
            "{method}"
        );
        assert_eq!(there.reason(), absent.reason(), "{method}");
        assert!(!there.message().contains("in1"), "{}", there.message());
    }
    // The request id of a run that is hidden is free for a caller who cannot see it.
    let own = listed(&admin, "in1", "shared-id").await;
    assert_ne!(own, hidden);
    // And root, who sees both, is told of the mix-up.
    let answer = run(&root, Deed::Create, "in1", "shared-id").await;
    assert_ne!(answer.reason(), "NOT_ALLOWED");
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_denied_and_everything_changed_is_in_the_trail_and_can_be_followed() {
    let agent = Agent::start(ROLES, "");
    let root = agent.client("root").await;
    let viewer = agent.client("viewer").await.channel();
    let newest = root.audit(v1::AuditFilter::default(), 1).await.unwrap();
    let last = newest.first().map_or(0, |entry| entry.sequence);
    let mut following = root
        .watch_audit(v1::AuditFilter::default(), last)
        .await
        .unwrap();
    for _ in 0..3 {
        let answer = run(&viewer, Deed::Cleanup, "in1", "").await;
        assert_eq!(answer.reason(), "NOT_ALLOWED");
    }
    run(&viewer, Deed::Create, "out1", "").await;
    let entry = following.message().await.unwrap().unwrap().entry.unwrap();
    assert_eq!(entry.result(), v1::AuditResult::Denied);
    let refused = run(&root.channel(), Deed::Revert, "in1", "").await;
    assert!(refused.error.is_some());
    let denied = v1::AuditFilter {
        identity: "viewer".to_owned(),
        results: vec![v1::AuditResult::Denied as i32],
        ..Default::default()
    };
    // What is denied over and over is written down together, a moment later.
    let patience = std::time::Instant::now() + std::time::Duration::from_secs(20);
    let entries = loop {
        let entries = root.audit(denied.clone(), 100).await.unwrap();
        let times: u64 = entries
            .iter()
            .filter(|entry| entry.action == "cleanup" && entry.vm_name == "in1")
            .map(|entry| entry.times)
            .sum();
        if times >= 3 {
            assert_eq!(times, 3, "{entries:?}");
            break entries;
        }
        assert!(std::time::Instant::now() < patience, "{entries:?}");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    };
    let hidden = entries
        .iter()
        .find(|entry| entry.vm_name == "out1")
        .unwrap();
    assert_eq!(
        (hidden.action.as_str(), hidden.reason.as_str()),
        ("create", "VM_NOT_FOUND")
    );
    let caller = hidden.caller.clone().unwrap();
    assert_eq!(caller.transport, "tls");
    assert!(caller.address.starts_with("127.0.0.1:"), "{caller:?}");
    let reverts = v1::AuditFilter {
        vm_name: "in1".to_owned(),
        identity: "root".to_owned(),
        ..Default::default()
    };
    let entries = root.audit(reverts, 100).await.unwrap();
    let told: Vec<_> = entries
        .iter()
        .map(|entry| (entry.action.as_str(), entry.result()))
        .collect();
    assert_eq!(
        told,
        [
            ("revert", v1::AuditResult::Failed),
            ("revert", v1::AuditResult::Accepted)
        ]
    );
    // Page by page it is the same.
    let all = root.audit(v1::AuditFilter::default(), 1_000).await.unwrap();
    assert!(all.windows(2).all(|two| two[0].sequence > two[1].sequence));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_on_streams_of_one_caller_is_a_clear_refusal_and_others_are_served() {
    let agent = Agent::start(ROLES, "[limits]\nmax_streams_per_peer = 2\n");
    let root = agent.client("root").await;
    let open = |client: Client| async move {
        client
            .watch_audit(v1::AuditFilter::default(), 0)
            .await
            .map(|stream| (client, stream))
    };
    let first = open(root.clone()).await.unwrap();
    let _second = open(root.clone()).await.unwrap();
    let error = open(root.clone()).await.unwrap_err();
    let failure = error.failure().unwrap();
    assert_eq!(failure.reason, "LIMIT_REACHED");
    assert_eq!(failure.metadata["limit"], "limits.max_streams_per_peer");
    // Another door is another peer.
    let local = connect(&agent.socket(), Default::default()).await.unwrap();
    open(local).await.unwrap();
    drop(first);
    let patience = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while open(root.clone()).await.is_err() {
        assert!(std::time::Instant::now() < patience, "no place came back");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_no_role_takes_no_place_from_who_has_one() {
    const LIMITS: &str = "[limits]\nmax_streams = 2\nmax_streams_per_peer = 2\nmax_calls = 2\n";
    let agent = Agent::start(ROLES, LIMITS);
    let nobody = agent.client("nobody").await;
    // Health may be watched by everybody whom the transport lets in.
    let watch = async || {
        let mut client = tonic_health::pb::health_client::HealthClient::new(nobody.channel());
        client
            .watch(tonic_health::pb::HealthCheckRequest::default())
            .await
    };
    let _watching = [watch().await.unwrap(), watch().await.unwrap()];
    let refused = watch().await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
    let root = agent.client("root").await;
    let followed = root.watch_audit(v1::AuditFilter::default(), 0).await;
    followed.unwrap();
    root.vms().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_is_too_large_and_a_name_that_is_too_long_are_refused_by_size_and_field() {
    let agent = Agent::start(ROLES, "");
    let files = agent.ca.caller(&agent.folder, "root", &[], NOW);
    let root = connect(&agent.tls(), files).await.unwrap();
    let error = root.vm(&"x".repeat(300_000)).await.unwrap_err();
    let failure = error.failure().unwrap();
    assert_eq!(failure.reason, "REQUEST_TOO_LARGE", "{}", error.chain());
    assert_eq!(failure.metadata["most_bytes"], "262144");
    let size: u64 = failure.metadata["size_bytes"].parse().unwrap();
    assert!((300_000..300_100).contains(&size), "{size}");
    // The connection is as good as before, and what just fits is read.
    let error = root.vm(&"x".repeat(262_000)).await.unwrap_err();
    assert_eq!(error.failure().unwrap().reason, "BAD_REQUEST");
    // A service that is open to all takes no more.
    let answer = call_health(&root.channel(), &"x".repeat(300_000)).await;
    assert_eq!(answer.reason(), "REQUEST_TOO_LARGE", "{answer:?}");
    let error = root.vm(&"x".repeat(300)).await.unwrap_err();
    let failure = error.failure().unwrap();
    assert_eq!(failure.reason, "BAD_REQUEST");
    assert_eq!(failure.violations[0].subject, "vm_name");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_reaches_beyond_the_vm_is_not_even_planned_for_who_does_not_see_all() {
    let agent = Agent::start(ROLES, "");
    let beyond = v1::PlanWorkflowRequest {
        spec: Some(spec(Deed::CleanupBeyond, "in1")),
    };
    for (name, wanted) in [
        ("viewer", "NOT_ALLOWED"),
        ("admin", "NOT_ALLOWED"),
        ("root", ""),
    ] {
        let client = agent.client(name).await;
        let answer = plan(&client.channel(), beyond.clone()).await;
        assert_eq!(answer.reason(), wanted, "{name}: {answer:?}");
        // Of what is the VM's own a plan may be seen.
        let own = v1::PlanWorkflowRequest {
            spec: Some(spec(Deed::Cleanup, "in1")),
        };
        let answer = plan(&client.channel(), own).await;
        assert_eq!(answer.reason(), "", "{name}: {answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_too_long_is_refused_with_its_field_in_an_answer_that_arrives() {
    let agent = Agent::start(ROLES, "");
    let root = agent.client("root").await;
    let long = "x".repeat(100_000);
    let of_field = |error: vmsnap_client::Error, field: &str| {
        let failure = error
            .failure()
            .unwrap_or_else(|| panic!("{}", error.chain()));
        assert_eq!(failure.reason, "BAD_REQUEST", "{}", error.chain());
        assert_eq!(failure.violations[0].subject, field, "{}", error.chain());
    };
    of_field(root.workflow(&long).await.unwrap_err(), "workflow_id");
    of_field(root.cancel(&long).await.unwrap_err(), "workflow_id");
    of_field(root.resolve(&long, "x").await.unwrap_err(), "workflow_id");
    of_field(root.forget_fix(&long).await.unwrap_err(), "id");
    of_field(root.record_fix(&long, "", "x").await.unwrap_err(), "reason");
    let create = v1::CreateOptions {
        exclude_disks: vec![long.clone()],
        accept_no_revert: true,
        ..Default::default()
    };
    let commit = v1::CommitOptions {
        resize_bytes: Some(1),
        resize_disk: long.clone(),
        ..Default::default()
    };
    let cleanup = |options| v1::WorkflowSpec {
        snapshot_name: String::new(),
        cleanup: Some(options),
        ..spec(Deed::Cleanup, "in1")
    };
    for (spec, field) in [
        (
            v1::WorkflowSpec {
                create: Some(create),
                ..spec(Deed::Create, "in1")
            },
            "create.exclude_disks",
        ),
        (
            v1::WorkflowSpec {
                commit: Some(commit),
                ..spec(Deed::Commit, "in1")
            },
            "commit.resize_disk",
        ),
        (
            cleanup(v1::CleanupOptions {
                name_pattern: long.clone(),
                ..Default::default()
            }),
            "cleanup.name_pattern",
        ),
        (
            cleanup(v1::CleanupOptions {
                keep_last: Some(1),
                time_zone: long.clone(),
                ..Default::default()
            }),
            "cleanup.time_zone",
        ),
        (
            cleanup(v1::CleanupOptions {
                leftovers: vec![format!("{long}/"); 2],
                leftovers_set: true,
                ..Default::default()
            }),
            "cleanup.leftovers",
        ),
    ] {
        of_field(root.plan(spec).await.unwrap_err(), field);
    }
}
