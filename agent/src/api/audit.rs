//! `AuditService`.

use std::pin::Pin;

use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Status};
use vmsnap_proto::v1::{self, audit_service_server::AuditService};

use super::{access, errors, paging, reply, workflow};
use crate::{
    journal::{AuditFilter, AuditResult, AuditRow, JournalError},
    planning::Fault,
    workflows::Workflows,
};

/// How many entries are read at once for somebody who follows.
const AT_ONCE: u32 = 200;

/// The service over the trail.
#[derive(Debug, Clone)]
pub struct Service(pub Workflows);

fn failed(fault: Fault) -> Status {
    errors::status(&fault)
}

fn unread(error: JournalError) -> Status {
    failed(error.into())
}

fn result(result: AuditResult) -> v1::AuditResult {
    match result {
        AuditResult::Accepted => v1::AuditResult::Accepted,
        AuditResult::Done => v1::AuditResult::Done,
        AuditResult::Failed => v1::AuditResult::Failed,
        AuditResult::Denied => v1::AuditResult::Denied,
    }
}

fn entry(row: AuditRow) -> v1::AuditEntry {
    v1::AuditEntry {
        sequence: row.sequence,
        time: Some(reply::timestamp(row.time)),
        caller: Some(reply::caller(&row.caller)),
        method: row.method,
        action: row.action,
        vm_name: row.vm,
        snapshot_name: row.snapshot,
        workflow_id: row.workflow,
        plan_hash: row.plan_hash,
        result: result(row.result) as i32,
        reason: row.reason,
        note: row.note,
        times: row.times,
    }
}

fn filter(asked: Option<v1::AuditFilter>) -> Result<AuditFilter, Status> {
    let asked = asked.unwrap_or_default();
    for (field, text) in [
        ("filter.vm_name", &asked.vm_name),
        ("filter.identity", &asked.identity),
        ("filter.method", &asked.method),
    ] {
        workflow::named(field, text)?;
    }
    let results: Vec<AuditResult> = AuditResult::ALL
        .into_iter()
        .filter(|known| asked.results.contains(&(result(*known) as i32)))
        .collect();
    if asked.results.len() > results.len() {
        return Err(failed(Fault::bad_field(
            "filter.results",
            "holds a value that is no result, or one twice",
        )));
    }
    let since = asked
        .since
        .map(|since| {
            jiff::Timestamp::new(since.seconds, since.nanos).map_err(|error| {
                failed(Fault::bad_field(
                    "filter.since",
                    format!("is no time: {error}"),
                ))
            })
        })
        .transpose()?;
    let set = |text: String| (!text.is_empty()).then_some(text);
    Ok(AuditFilter {
        vm: set(asked.vm_name),
        identity: set(asked.identity),
        method: set(asked.method),
        results,
        since,
        ..AuditFilter::default()
    })
}

#[tonic::async_trait]
impl AuditService for Service {
    async fn list_audit(
        &self,
        request: Request<v1::ListAuditRequest>,
    ) -> Result<Response<v1::ListAuditResponse>, Status> {
        // What was denied a moment ago belongs to it.
        access::of(&request)?.auditor().flush().await;
        let message = request.into_inner();
        let limit = workflow::page(message.page_size, 100, 1_000);
        let before = match paging::Token::read(&message.page_token)? {
            None => None,
            Some(token) => Some(token.group.parse().map_err(|_| paging::foreign_token())?),
        };
        let rows = self
            .0
            .journal()
            .audited(AuditFilter {
                before,
                limit: limit + 1,
                ..filter(message.filter)?
            })
            .await
            .map_err(unread)?;
        let mut page = paging::Page::new(limit as usize);
        for row in rows {
            let token = paging::Token::new(&row.sequence.to_string(), "", 0);
            page.add(token, entry(row));
        }
        let (entries, next_page_token) = page.end();
        Ok(Response::new(v1::ListAuditResponse {
            entries,
            next_page_token,
        }))
    }

    type WatchAuditStream =
        Pin<Box<dyn Stream<Item = Result<v1::WatchAuditResponse, Status>> + Send>>;

    async fn watch_audit(
        &self,
        request: Request<v1::WatchAuditRequest>,
    ) -> Result<Response<Self::WatchAuditStream>, Status> {
        let message = request.into_inner();
        let filter = filter(message.filter)?;
        let journal = self.0.journal().clone();
        let (send, receive) = tokio::sync::mpsc::channel(16);
        tokio::spawn(async move {
            let mut grows = journal.audit_grows();
            let mut last = message.after_sequence;
            loop {
                grows.mark_unchanged();
                let wanted = AuditFilter {
                    behind: Some(last),
                    limit: AT_ONCE,
                    ..filter.clone()
                };
                let rows = match journal.audited(wanted).await {
                    Ok(rows) => rows,
                    Err(error) => {
                        // Who follows and is gone needs no reason.
                        let _ = send.send(Err(unread(error))).await;
                        return;
                    }
                };
                let all = rows.len() < AT_ONCE as usize;
                for row in rows {
                    last = row.sequence;
                    let message = v1::WatchAuditResponse {
                        entry: Some(entry(row)),
                    };
                    if send.send(Ok(message)).await.is_err() {
                        return;
                    }
                }
                if all {
                    tokio::select! {
                        changed = grows.changed() => {
                            if changed.is_err() {
                                return;
                            }
                        }
                        () = send.closed() => return,
                    }
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receive))))
    }
}
