//! `KnownIssueService`.

use tonic::{Request, Response, Status};
use vmsnap_proto::v1::{self, known_issue_service_server::KnownIssueService};

use super::{errors, reply, workflow};
use crate::{
    journal::Learned,
    planning::{Fault, Reason},
    workflows::Workflows,
};

/// Longest fix, in bytes.
const FIX_MOST: usize = 4_096;

/// The service over the journal.
#[derive(Debug, Clone)]
pub struct Service(pub Workflows);

fn failed(fault: Fault) -> Status {
    errors::status(&fault)
}

fn issue(learned: &Learned) -> v1::KnownIssue {
    let subject = if learned.subject.is_empty() {
        "this host".to_owned()
    } else {
        format!("'{}'", learned.subject)
    };
    v1::KnownIssue {
        id: learned.id.clone(),
        title: format!("{} on {subject}", learned.reason),
        applies_when: format!("a run meets {subject}"),
        what_happens: format!("failed with {} here before", learned.reason),
        what_to_do: learned.fix.clone(),
        learned: true,
        reason: learned.reason.clone(),
        subject: learned.subject.clone(),
        last_seen: Some(reply::timestamp(learned.last)),
        times_seen: learned.seen,
    }
}

#[tonic::async_trait]
impl KnownIssueService for Service {
    async fn list_known_issues(
        &self,
        request: Request<v1::ListKnownIssuesRequest>,
    ) -> Result<Response<v1::ListKnownIssuesResponse>, Status> {
        let message = request.into_inner();
        let learned = self
            .0
            .journal()
            .learned()
            .await
            .map_err(|error| failed(error.into()))?;
        let all: Vec<v1::KnownIssue> = learned.iter().map(issue).collect();
        let (issues, next_page_token) = workflow::slice(
            &all,
            workflow::page(message.page_size, 100, 1_000),
            &message.page_token,
        )?;
        Ok(Response::new(v1::ListKnownIssuesResponse {
            issues,
            next_page_token,
        }))
    }

    async fn record_fix(
        &self,
        request: Request<v1::RecordFixRequest>,
    ) -> Result<Response<v1::RecordFixResponse>, Status> {
        let message = request.into_inner();
        let Some(reason) = Reason::ALL
            .iter()
            .find(|reason| reason.as_str() == message.reason)
        else {
            let nearest = crate::planning::names::nearest(
                &message.reason,
                Reason::ALL.iter().map(|reason| reason.as_str()),
            );
            let hint = nearest
                .map(|it| format!("; did you mean {it}?"))
                .unwrap_or_default();
            return Err(failed(Fault::bad_field(
                "reason",
                format!(
                    "'{}' is no reason code{hint}",
                    message.reason.escape_debug()
                ),
            )));
        };
        if message.fix.trim().is_empty() || message.fix.len() > FIX_MOST {
            return Err(failed(Fault::bad_field(
                "fix",
                format!(
                    "has {} bytes; a text of 1 to {FIX_MOST} is needed",
                    message.fix.len()
                ),
            )));
        }
        if let Err(problem) = crate::planning::names::check_reference(&message.subject) {
            return Err(failed(Fault::bad_field("subject", problem)));
        }
        let learned = self
            .0
            .journal()
            .learn(reason.as_str(), &message.subject, Some(&message.fix))
            .await
            .map_err(|error| failed(error.into()))?;
        Ok(Response::new(v1::RecordFixResponse {
            issue: Some(issue(&learned)),
        }))
    }

    async fn forget_fix(
        &self,
        request: Request<v1::ForgetFixRequest>,
    ) -> Result<Response<v1::ForgetFixResponse>, Status> {
        let id = request.into_inner().id;
        let gone = self
            .0
            .journal()
            .forget_learned(&id)
            .await
            .map_err(|error| failed(error.into()))?;
        if gone {
            Ok(Response::new(v1::ForgetFixResponse {}))
        } else {
            Err(failed(
                Fault::new(
                    Reason::IssueNotFound,
                    format!(
                        "nothing with the id '{}' was learned here",
                        id.escape_debug()
                    ),
                )
                .with("id", id),
            ))
        }
    }
}
