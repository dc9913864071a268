//! `KnownIssueService`: the built-in catalogue, and what this host taught.

use tonic::{Request, Response, Status};
use vmsnap_proto::v1::{self, known_issue_service_server::KnownIssueService};

use super::{access, errors, paging, reply, veil::Veil, workflow};
use crate::{
    planning::{
        Fault, Reason,
        issues::{self, Found, Issue, Learned},
        request::{Action, DEFAULT_POOL, List},
    },
    trust::{Did, Role},
    workflows::Workflows,
};

/// Longest fix, in bytes.
const FIX_MOST: usize = 4_096;

/// The service over the catalogue and the journal.
#[derive(Debug, Clone)]
pub struct Service(pub Workflows);

fn failed(fault: Fault) -> Status {
    errors::status(&fault)
}

fn learned(learned: &Learned) -> v1::KnownIssue {
    let subject = if learned.subject.is_empty() {
        "this host".to_owned()
    } else {
        format!("'{}'", learned.subject)
    };
    v1::KnownIssue {
        id: learned.id.clone(),
        title: format!("{} on {subject}", learned.reason),
        applies_when: format!("a run has to do with {subject}"),
        what_happens: if learned.seen > 0 {
            format!("runs failed with {} here before", learned.reason)
        } else {
            format!("a run fails with {}", learned.reason)
        },
        what_to_do: learned.fix.clone(),
        learned: true,
        reason: learned.reason.clone(),
        subject: learned.subject.clone(),
        last_seen: (learned.seen > 0).then(|| reply::timestamp(learned.last)),
        times_seen: learned.seen,
        found: String::new(),
    }
}

fn built_in(issue: &Issue, found: String) -> v1::KnownIssue {
    v1::KnownIssue {
        id: issue.id.clone(),
        title: issue.title.clone(),
        applies_when: issue.applies_when.clone(),
        what_happens: issue.what_happens.clone(),
        what_to_do: issue.what_to_do.clone(),
        reason: issue.reason.map(|it| it.to_string()).unwrap_or_default(),
        found,
        ..v1::KnownIssue::default()
    }
}

impl Service {
    /// All that is known, or what applies to a VM now.
    async fn known(&self, vm: &str, veil: &Veil) -> Result<Vec<v1::KnownIssue>, Fault> {
        if vm.is_empty() {
            let here = self.0.journal().learned().await?;
            return Ok(here
                .iter()
                .filter(|it| veil.shows_learned(it))
                .map(learned)
                .chain(
                    issues::catalogue()
                        .iter()
                        .map(|issue| built_in(issue, String::new())),
                )
                .collect());
        }
        let request = crate::planning::Request {
            vm: vm.to_owned(),
            // Reads also who else uses the VM's files.
            action: Action::List(List::default()),
            start_if_stopped: false,
            pool: DEFAULT_POOL.to_owned(),
        };
        request.check()?;
        let facts = self.0.observer().facts(&request).await?;
        let about = facts
            .learned
            .iter()
            .filter(|it| issues::is_about(it, &facts));
        Ok(about
            .map(learned)
            .chain(
                issues::applying(&facts)
                    .into_iter()
                    .map(|found| veil.found(found))
                    .map(|Found { issue, on }| built_in(issue, on)),
            )
            .collect())
    }
}

#[tonic::async_trait]
impl KnownIssueService for Service {
    async fn list_known_issues(
        &self,
        request: Request<v1::ListKnownIssuesRequest>,
    ) -> Result<Response<v1::ListKnownIssuesResponse>, Status> {
        let caller = access::of(&request)?;
        let message = request.into_inner();
        let vm = message.vm_name.as_str();
        workflow::named("vm_name", vm)?;
        if !vm.is_empty() {
            access::over(&self.0, &caller, "ListKnownIssues", Role::Viewer, vm).await?;
        }
        let veil = Veil::of(&self.0, &caller).await?;
        let known = self.known(vm, &veil).await;
        let all = known.map_err(|fault| veil.status(&fault))?;
        let (issues, next_page_token) = paging::of_list(
            all,
            |issue: &v1::KnownIssue| &issue.id,
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
        let caller = access::of(&request)?;
        let message = request.into_inner();
        access::bounded("reason", &message.reason, access::ID_MOST)?;
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
        let kept = self
            .0
            .journal()
            .learn(reason.as_str(), &message.subject, Some(&message.fix))
            .await
            .map_err(|error| failed(error.into()))?;
        let note = format!("{reason} on '{}': {}", message.subject, message.fix);
        let did = Did {
            method: "RecordFix",
            note: &note,
            ..Did::default()
        };
        let audited = caller.auditor().did(caller.caller(), did, None);
        audited.await.map_err(failed)?;
        Ok(Response::new(v1::RecordFixResponse {
            issue: Some(learned(&kept)),
        }))
    }

    async fn forget_fix(
        &self,
        request: Request<v1::ForgetFixRequest>,
    ) -> Result<Response<v1::ForgetFixResponse>, Status> {
        let caller = access::of(&request)?;
        let id = request.into_inner().id;
        access::bounded("id", &id, access::ID_MOST)?;
        if issues::catalogue().iter().any(|issue| issue.id == id) {
            return Err(failed(Fault::bad_field(
                "id",
                format!("'{id}' is built in; only what was learned here can be forgotten"),
            )));
        }
        let gone = self
            .0
            .journal()
            .forget_learned(&id)
            .await
            .map_err(|error| failed(error.into()))?;
        if gone {
            let did = Did {
                method: "ForgetFix",
                note: &id,
                ..Did::default()
            };
            let audited = caller.auditor().did(caller.caller(), did, None);
            audited.await.map_err(failed)?;
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
