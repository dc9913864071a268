//! Arming and ending the guard of a change.
//!
//! Invariant: the deadline is on disk before the step is done, so that it
//! outlives the agent.

use jiff::{SignedDuration, Timestamp};

use super::Performer;
use crate::planning::{
    Done, Fault, Reason, Step,
    guard::{Guard, GuardState},
};

impl Performer {
    pub(super) async fn arm(
        &self,
        snapshot: &str,
        within_ms: u64,
        created_by: usize,
        done: &[Option<Done>],
    ) -> Result<Done, Fault> {
        let Some(Some(Done::Created { created, .. })) = done.get(created_by) else {
            return Err(Fault::new(
                Reason::Internal,
                format!("no step made snapshot '{snapshot}', so nothing can be guarded"),
            ));
        };
        let fingerprint = self.observer.fingerprint(self.vm()).await?;
        let armed = Timestamp::now();
        let within = SignedDuration::from_millis(i64::try_from(within_ms).unwrap_or(i64::MAX));
        let deadline = armed.checked_add(within).unwrap_or(Timestamp::MAX);
        let guard = Guard {
            run: self.live.id.clone(),
            vm_uuid: self.plan.vm_uuid.clone(),
            vm: self.vm().to_owned(),
            snapshot: snapshot.to_owned(),
            created: *created,
            armed,
            deadline,
            fingerprint,
            state: GuardState::Pending,
            note: String::new(),
        };
        self.journal.put_guard(guard).await?;
        Ok(Done::Guarded { deadline })
    }

    pub(super) async fn disarm(&self) -> Result<String, Fault> {
        self.journal.remove_guard(&self.live.id).await?;
        Ok("nothing is guarded".into())
    }

    pub(super) async fn end_guard(&self, snapshot: &str, state: GuardState) -> Result<Done, Fault> {
        let open = self.journal.open_guard(&self.plan.vm_uuid).await?;
        let Some(guard) = open.filter(|guard| guard.snapshot == snapshot) else {
            return Ok(super::plain("it was ended meanwhile"));
        };
        self.journal
            .put_guard(Guard {
                state,
                note: String::new(),
                ..guard
            })
            .await?;
        Ok(super::plain(""))
    }

    /// The run that ended a guard failed: what was guarded is guarded again, unless
    /// it was taken back for good.
    pub(super) async fn arm_again(
        &self,
        snapshot: &str,
        done: &[Option<Done>],
    ) -> Result<String, Fault> {
        let mut reverts = self.plan.steps.iter().zip(done);
        if reverts.any(|(step, done)| {
            matches!(step, Step::Revert { .. } | Step::RevertDisks { .. }) && done.is_some()
        }) {
            return Ok("the guard stays ended, as the change was taken back".into());
        }
        let before = self
            .facts
            .as_ref()
            .and_then(|facts| facts.guard.clone())
            .filter(|guard| guard.snapshot == snapshot);
        match before {
            Some(guard) => {
                self.journal.put_guard(guard).await?;
                Ok("the change is guarded again".into())
            }
            // In recovery nobody remembers how it was: it ended, and that is said.
            None => Ok("the guard stays ended".into()),
        }
    }
}
