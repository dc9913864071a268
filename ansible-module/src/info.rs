//! The module `vm_snapshot_info`: reads, and changes nothing.

use serde_json::Value;
use vmsnap_client::json::ToJson;
use vmsnap_client::{Client, Error};
use vmsnap_proto::v1;

use crate::failed;
use crate::rendered::Values;
use crate::task::Task;

/// The agent's reason for a pool that is not there.
const POOL_NOT_FOUND: &str = "POOL_NOT_FOUND";

/// Reads what the task asks for.
pub async fn read(task: Task) -> Values {
    let mut values = Values::new();
    let limit = task.duration("timeout").unwrap_or_default();
    let reading = async {
        let client = crate::connect(&task).await?;
        match task.text("workflow_id") {
            Some(id) => {
                let workflow = client.workflow(id).await?;
                values.insert("workflow".to_owned(), workflow.to_json());
                Ok(format!("read workflow {id}"))
            }
            None => everything(&client, &task, &mut values).await,
        }
    };
    match tokio::time::timeout(limit, reading).await {
        Ok(Ok(text)) => drop(values.insert("msg".to_owned(), Value::from(text))),
        Ok(Err(error)) => {
            values = Values::new();
            failed::add_error(&mut values, &error);
        }
        Err(_) => {
            let limit = vmsnap_client::quantity::format_duration(limit);
            let text = format!("the agent did not answer within the timeout of {limit}");
            values = Values::new();
            failed::add_plain(&mut values, failed::NO_AGENT, &text);
        }
    }
    values
}

async fn everything(client: &Client, task: &Task, values: &mut Values) -> Result<String, Error> {
    let named = task.list("vm_name").filter(|names| !names.is_empty());
    let newest = task.number("workflows").unwrap_or_default();
    values.insert("host".to_owned(), client.host().await?.to_json());
    let (mut vms, mut snapshots, mut workflows) = (Vec::new(), Vec::new(), Vec::new());
    match named {
        Some(names) => {
            for name in names {
                vms.push(client.vm(name).await?.to_json());
                snapshots.extend(client.snapshots(name).await?);
                workflows.extend(runs(client, name, newest).await?);
            }
        }
        None => {
            vms.extend(client.vms().await?.iter().map(ToJson::to_json));
            snapshots = client.snapshots("").await?;
            workflows = runs(client, "", newest).await?;
        }
    }
    let text = format!("read {} VMs with {} snapshots", vms.len(), snapshots.len());
    let storage = storage(client, task.text("pool").unwrap_or_default()).await?;
    values.insert("vms".to_owned(), Value::Array(vms));
    values.insert("snapshots".to_owned(), snapshots.to_json());
    values.insert("storage".to_owned(), storage);
    values.insert("workflows".to_owned(), workflows.to_json());
    Ok(text)
}

/// A host without a pool of that name is a host all the same.
async fn storage(client: &Client, pool: &str) -> Result<Value, Error> {
    match client.volumes(pool).await {
        Ok(storage) => Ok(storage.to_json()),
        Err(Error::Failed(failure)) if failure.reason == POOL_NOT_FOUND => {
            Ok(v1::Storage::default().to_json())
        }
        Err(error) => Err(error),
    }
}

async fn runs(client: &Client, vm_name: &str, newest: u64) -> Result<Vec<v1::Workflow>, Error> {
    let filter = v1::ListWorkflowsRequest {
        vm_name: vm_name.to_owned(),
        ..Default::default()
    };
    client
        .workflows(filter, usize::try_from(newest).unwrap_or(usize::MAX))
        .await
}
