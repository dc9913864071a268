use std::sync::mpsc;

use super::*;

fn lanes() -> Lanes {
    Lanes::new(Duration::from_millis(200), |_| {})
}

fn call(scope: &str, deadline: Duration) -> Call {
    Call {
        operation: "try",
        subject: format!("domain {scope}"),
        scope: Some(scope.to_owned()),
        deadline,
        changes: false,
        asks: Asks::Nothing,
    }
}

/// A question to a guest agent.
fn question(scope: &str, asks: Asks) -> Call {
    Call {
        asks,
        ..call(scope, LONG)
    }
}

const LONG: Duration = Duration::from_secs(30);
const SHORT: Duration = Duration::from_millis(20);

/// A call that hangs until its sender is dropped.
async fn hang(lanes: &Lanes, lane: Lane, scope: &str) -> (Error, mpsc::Sender<()>) {
    let (release, hung) = mpsc::channel::<()>();
    let error = lanes
        .run(lane, call(scope, SHORT), move || {
            let _ = hung.recv();
            Ok(())
        })
        .await
        .expect_err("a hung call is overdue");
    (error, release)
}

#[tokio::test]
async fn a_call_past_its_deadline_is_answered_while_its_thread_goes_on() {
    let lanes = lanes();
    let (error, release) = hang(&lanes, Lane::Read, "web").await;
    assert_eq!(*error.kind(), ErrorKind::Overdue { after: SHORT });
    assert!(error.outcome_unknown());
    assert_eq!(lanes.late(), 1);
    assert_eq!(lanes.in_flight(), 1);
    drop(release);
    lanes.settled("web").await;
    assert_eq!(lanes.late(), 0);
    assert_eq!(lanes.in_flight(), 0);
}

#[tokio::test]
async fn after_an_overrun_the_domain_is_busy_until_the_late_call_comes_back() {
    let lanes = lanes();
    let (_, release) = hang(&lanes, Lane::Effect, "web").await;
    let refused = lanes.run(Lane::Read, call("web", LONG), || Ok(1)).await;
    assert_eq!(*refused.expect_err("busy").kind(), ErrorKind::Busy);
    assert_eq!(
        lanes.run(Lane::Release, call("web", LONG), || Ok(2)).await,
        Ok(2)
    );
    assert_eq!(
        lanes.run(Lane::Read, call("db", LONG), || Ok(3)).await,
        Ok(3)
    );
    drop(release);
    assert_eq!(
        lanes.run(Lane::Effect, call("web", LONG), || Ok(4)).await,
        Ok(4)
    );
}

#[tokio::test]
async fn one_release_at_a_time_is_sent_for_a_domain() {
    let lanes = lanes();
    let (_, release) = hang(&lanes, Lane::Release, "web").await;
    let refused = lanes.run(Lane::Release, call("web", LONG), || Ok(())).await;
    assert_eq!(*refused.expect_err("busy").kind(), ErrorKind::Busy);
    drop(release);
    lanes.settled("web").await;
    assert_eq!(
        lanes.run(Lane::Release, call("web", LONG), || Ok(())).await,
        Ok(())
    );
}

#[tokio::test]
async fn a_panic_in_a_call_is_an_error_and_the_lane_goes_on() {
    let lanes = lanes();
    let panicked = lanes
        .run::<(), _>(Lane::Read, call("web", LONG), || {
            panic!("unable to drop reference")
        })
        .await
        .expect_err("a panic is an error");
    assert_eq!(*panicked.kind(), ErrorKind::CallPanicked);
    assert_eq!(panicked.detail(), "unable to drop reference");
    assert_eq!(
        lanes.run(Lane::Read, call("web", LONG), || Ok(7)).await,
        Ok(7)
    );
}

#[tokio::test]
async fn late_calls_of_many_domains_leave_room_for_releases_and_never_exceed_the_bound() {
    let lanes = lanes();
    let mut hung = Vec::new();
    for n in 0..IN_FLIGHT {
        hung.push(hang(&lanes, Lane::Read, &format!("vm{n}")).await.1);
    }
    assert_eq!(lanes.late(), IN_FLIGHT);
    let refused = lanes.run(Lane::Read, call("other", LONG), || Ok(())).await;
    assert_eq!(*refused.expect_err("no place left").kind(), ErrorKind::Busy);
    assert_eq!(
        lanes
            .run(Lane::Release, call("other", LONG), || Ok(()))
            .await,
        Ok(())
    );
    hung.clear();
    for n in 0..IN_FLIGHT {
        lanes.settled(&format!("vm{n}")).await;
    }
    assert_eq!(
        lanes.run(Lane::Read, call("other", LONG), || Ok(())).await,
        Ok(())
    );
}

#[tokio::test]
async fn a_caller_that_goes_away_does_not_leave_its_call_uncounted() {
    let lanes = lanes();
    let (release, hung) = mpsc::channel::<()>();
    let gone = lanes.run(Lane::Effect, call("web", SHORT), move || {
        let _ = hung.recv();
        Ok(())
    });
    let _ = tokio::time::timeout(SHORT / 2, gone).await;
    while lanes.late() == 0 {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    drop(release);
    lanes.settled("web").await;
    assert_eq!(lanes.late(), 0);
}

/// Asks an agent that hangs for longer than `SILENT`, and then gives up, as libvirt does.
async fn unanswered(lanes: &Lanes, lane: Lane, scope: &str) {
    let fault = lanes.run(lane, question(scope, Asks::Quick), || {
        std::thread::sleep(SILENT + Duration::from_millis(100));
        Err::<(), _>(Fault::new(ErrorKind::AgentTimeout, ""))
    });
    assert_eq!(
        *fault.await.expect_err("no answer").kind(),
        ErrorKind::AgentTimeout
    );
}

#[tokio::test]
async fn silent_agents_leave_places_to_those_that_answer_in_every_lane() {
    let lanes = Arc::new(Lanes::new(LONG, |_| {}));
    for lane in [Lane::Release, Lane::Guest] {
        // Each is known to be silent from here on.
        let first = (0..PER_LANE).map(|n| {
            let lanes = lanes.clone();
            tokio::spawn(async move { unanswered(&lanes, lane, &format!("silent{n}")).await })
        });
        for one in first.collect::<Vec<_>>() {
            one.await.expect("it fails as it should");
        }
        // They hang until the others were answered.
        let (release, hung) = mpsc::channel::<()>();
        let hung = Arc::new(Mutex::new(hung));
        let hanging: Vec<_> = (0..25)
            .map(|n| {
                let (lanes, hung) = (lanes.clone(), hung.clone());
                let silent = question(&format!("silent{}", n % PER_LANE), Asks::Quick);
                let hang = move || {
                    let _ = lock(&hung).recv();
                    Ok(())
                };
                tokio::spawn(async move { lanes.run(lane, silent, hang).await })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(50)).await;
        for n in 0..5 {
            let well = question(&format!("well{n}"), Asks::Quick);
            assert_eq!(lanes.run(lane, well, move || Ok(n)).await, Ok(n));
            let freeze = question(&format!("well{n}"), Asks::Long);
            assert_eq!(lanes.run(Lane::Guest, freeze, || Ok(())).await, Ok(()));
        }
        drop(release);
        for silent in hanging {
            silent.await.expect("no panic").expect("it came back");
        }
    }
}

#[tokio::test]
async fn freezes_that_hang_hold_up_neither_effects_nor_questions_nor_releases() {
    let lanes = Arc::new(Lanes::new(LONG, |_| {}));
    let (release, hung) = mpsc::channel::<()>();
    let hung = Arc::new(Mutex::new(hung));
    let freezing: Vec<_> = (0..25)
        .map(|n| {
            let (lanes, hung) = (lanes.clone(), hung.clone());
            tokio::spawn(async move {
                let freeze = question(&format!("vm{n}"), Asks::Long);
                let hang = move || {
                    let _ = lock(&hung).recv();
                    Ok(())
                };
                lanes.run(Lane::Guest, freeze, hang).await
            })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(50)).await;
    for (lane, asks) in [
        (Lane::Read, Asks::Nothing),
        (Lane::Effect, Asks::Nothing),
        (Lane::Release, Asks::Quick),
        (Lane::Guest, Asks::Quick),
    ] {
        let next = tokio::time::timeout(LONG, lanes.run(lane, question("next", asks), || Ok(())));
        assert_eq!(next.await, Ok(Ok(())), "{lane:?}");
    }
    drop(release);
    for freeze in freezing {
        assert_eq!(freeze.await.expect("no panic"), Ok(()));
    }
}

#[tokio::test]
async fn calls_that_copy_much_wait_for_each_other_and_leave_places_for_short_effects() {
    let lanes = Arc::new(Lanes::new(LONG, |_| {}));
    let (release, hung) = mpsc::channel::<()>();
    let hung = Arc::new(Mutex::new(hung));
    let copying: Vec<_> = (0..25)
        .map(|n| {
            let (lanes, hung) = (lanes.clone(), hung.clone());
            tokio::spawn(async move {
                let _place = lanes.bulk().await;
                let hang = move || {
                    let _ = lock(&hung).recv();
                    Ok(())
                };
                let copy = call(&format!("vm{n}"), LONG);
                lanes.run(Lane::Effect, copy, hang).await
            })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(lanes.in_flight(), BULK);
    let suspend = lanes.run(Lane::Effect, call("next", LONG), || Ok(()));
    assert_eq!(tokio::time::timeout(LONG, suspend).await, Ok(Ok(())));
    drop(release);
    for copy in copying {
        assert_eq!(copy.await.expect("no panic"), Ok(()));
    }
}
