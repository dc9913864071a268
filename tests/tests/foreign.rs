//! The contract in the hands of a foreign client: Python's grpcio, with stubs
//! generated from the `.proto` files.

use anyhow::Result;
use serde_json::{Value, json};
use vmsnap_tests::{
    BlankSpec, Lab, paths,
    python::{Stubs, python},
};

#[test]
fn a_foreign_client_runs_watches_and_reads_rich_errors_over_socket_and_loopback() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec::default())?;
    let stubs = Stubs::new(&lab)?;
    let shown = stubs.folder();
    let script = paths::checkout()
        .join("tests/tests/foreign_client.py")
        .display()
        .to_string();
    for address in [agent.address(), agent.tcp()?] {
        let report: Value =
            serde_json::from_str(&python(&[&script, &address, &domain.name, &shown])?)?;
        assert_eq!(report["health"], "SERVING");
        let services = report["services"].to_string();
        for service in [
            "WorkflowService",
            "InventoryService",
            "KnownIssueService",
            "AuditService",
            "Health",
        ] {
            assert!(services.contains(service), "{services}");
        }
        let events = report["events"].to_string();
        assert!(
            events.starts_with("[\"planned\",") && events.ends_with("\"outcome\"]"),
            "{events}"
        );
        assert!(events.contains("hold_taken") && events.contains("hold_released"));
        let count = report["sequences"].as_array().map_or(0, Vec::len);
        assert_eq!(report["sequences"], json!((1..=count).collect::<Vec<_>>()));
        assert_eq!(report["watched"], json!((3..=count).collect::<Vec<_>>()));
        assert_eq!(report["changed"], true);
        assert_eq!(report["state"], "WORKFLOW_STATE_SUCCEEDED");
        assert_eq!(report["error"]["code"], "NOT_FOUND");
        assert_eq!(report["error"]["reason"], "SNAPSHOT_NOT_FOUND");
        assert_eq!(report["error"]["domain"], "vmsnap");
        assert!(
            report["error"]["metadata"]["valid_names"]
                .as_str()
                .is_some_and(|names| names.starts_with("foreign-"))
        );
        assert_eq!(report["bad"]["code"], "INVALID_ARGUMENT");
        assert_eq!(report["bad"]["fields"], json!(["vm_name", "snapshot_name"]));
        assert_eq!(domain.state()?, "running");
    }
    Ok(())
}
