//! Inputs at random for whatever reads what somebody else wrote.
//!
//! Purpose: the tests of all crates feed their readers through [`Class::check`],
//! so that one number, the environment's [`INPUTS`], sets how many inputs there
//! are, and `cargo xtask fuzz` can add up what was done.
//!
//! Invariants
//! - A panic, a check that does not hold, and an input that takes longer than
//!   [`LONGEST`] are failures, each with the seed that repeats them.
//! - An input is counted after the reader dealt with it, never before.

pub mod inputs;

use std::{
    fmt::Debug,
    fs::File,
    io::Write as _,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use proptest::{
    strategy::Strategy,
    test_runner::{
        Config, RngAlgorithm, TestCaseError, TestCaseResult, TestError, TestRng, TestRunner,
    },
};

/// Variable with the number of inputs of all classes together.
pub const INPUTS: &str = "VMSNAP_FUZZ_INPUTS";
/// Variable with the seed that a failure named.
pub const SEED: &str = "VMSNAP_FUZZ_SEED";
/// Variable with the folder in which each class leaves a line: its name, its
/// inputs and its milliseconds, with tabs between.
pub const TALLY: &str = "VMSNAP_FUZZ_TALLY";

/// Inputs of a class when nobody asks for more.
const FEW: u32 = 256;
/// A reader that needs longer for one input hangs, on the slowest machine too.
const LONGEST: Duration = Duration::from_secs(20);

/// A kind of input.
#[derive(Debug, Clone, Copy)]
pub struct Class {
    /// Its name, without tabs.
    pub name: &'static str,
    /// Its share of all inputs, in thousandths.
    pub share: u32,
    /// Its inputs when nobody asks for more.
    pub few: u32,
}

impl Class {
    /// A class with a share of all inputs in thousandths.
    #[must_use]
    pub const fn new(name: &'static str, share: u32) -> Self {
        Self {
            name,
            share,
            few: FEW,
        }
    }

    /// The same with other inputs when nobody asks for more: few for a reader
    /// that is slow.
    #[must_use]
    pub const fn few(mut self, few: u32) -> Self {
        self.few = few;
        self
    }

    /// How many inputs are asked for.
    ///
    /// # Panics
    /// When [`INPUTS`] is no number.
    #[must_use]
    pub fn cases(self) -> u32 {
        let Some(all) = number(INPUTS) else {
            return self.few;
        };
        u32::try_from((all * u64::from(self.share)).div_ceil(1000))
            .unwrap_or(u32::MAX)
            .max(1)
    }

    /// Feeds inputs to `reader`, which fails by an error or by a panic.
    ///
    /// # Panics
    /// With the smallest input that fails, and the seed.
    pub fn check<S>(self, inputs: &S, reader: impl Fn(S::Value) -> TestCaseResult)
    where
        S: Strategy,
        S::Value: Debug,
    {
        let cases = self.cases();
        let seed = number(SEED).unwrap_or_else(random);
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        let config = Config {
            cases,
            failure_persistence: None,
            max_shrink_iters: 2_000,
            max_shrink_time: 60_000,
            ..Config::default()
        };
        let mut runner =
            TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
        let (done, since) = (AtomicU64::new(0), Instant::now());
        let watch = Watch::over(self.name, seed);
        let result = runner.run(inputs, |input| {
            let began = Instant::now();
            watch.begin();
            let result = reader(input);
            watch.end();
            done.fetch_add(1, Ordering::Relaxed);
            let took = began.elapsed();
            if took > LONGEST / 2 {
                return Err(TestCaseError::fail(format!(
                    "one input took {} ms",
                    took.as_millis()
                )));
            }
            result
        });
        drop(watch);
        match result {
            Ok(()) => self.told(done.into_inner(), since.elapsed()),
            Err(TestError::Fail(why, input)) => {
                let shown = format!("{input:#?}");
                let shown: String = shown.chars().take(20_000).collect();
                panic!(
                    "{}: {why}\nthe smallest input: {shown}\nagain with {SEED}={seed} and the same {INPUTS}",
                    self.name
                );
            }
            Err(TestError::Abort(why)) => panic!("{}: {why}", self.name),
        }
    }

    /// Leaves a line for `cargo xtask fuzz`.
    fn told(self, inputs: u64, took: Duration) {
        let Some(folder) = std::env::var_os(TALLY) else {
            return;
        };
        let path = PathBuf::from(folder).join(self.name.replace(['/', ' '], "-"));
        let line = format!("{}\t{inputs}\t{}\n", self.name, took.as_millis());
        File::create(&path)
            .and_then(|mut file| file.write_all(line.as_bytes()))
            .unwrap_or_else(|error| panic!("{} cannot be written: {error}", path.display()));
    }
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    match text.parse() {
        Ok(number) => Some(number),
        Err(_) => panic!("{variable} is '{text}'; a whole number is needed"),
    }
}

fn random() -> u64 {
    use std::hash::{BuildHasher as _, RandomState};
    RandomState::new().hash_one(0)
}

/// Ends the process when one input takes too long: a loop in a reader cannot be
/// left in any other way, and the test runner would not say which class it was.
struct Watch {
    /// Milliseconds from `epoch` to the beginning of the input; 0 between inputs.
    began: Arc<AtomicU64>,
    epoch: Instant,
    over: Arc<AtomicBool>,
}

impl Watch {
    fn over(class: &'static str, seed: u64) -> Self {
        let (began, over) = (
            Arc::new(AtomicU64::new(0)),
            Arc::new(AtomicBool::new(false)),
        );
        let epoch = Instant::now();
        let (watched, ended) = (Arc::clone(&began), Arc::clone(&over));
        thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                thread::park_timeout(Duration::from_millis(500));
                let began = watched.load(Ordering::Relaxed);
                if began > 0 && epoch.elapsed() > Duration::from_millis(began) + LONGEST {
                    #[expect(clippy::print_stderr, reason = "the process ends here")]
                    {
                        eprintln!(
                            "{class}: one input hangs; again with {SEED}={seed} and the same {INPUTS}"
                        );
                    }
                    std::process::abort();
                }
            }
        });
        Self { began, epoch, over }
    }

    fn begin(&self) {
        let now = u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.began.store(now.max(1), Ordering::Relaxed);
    }

    fn end(&self) {
        self.began.store(0, Ordering::Relaxed);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_reader_that_fails_on_some_input_is_found_and_the_input_is_named() {
        let found = std::panic::catch_unwind(|| {
            Class::new("a reader with a fault", 1).check(&(0..100_u32), |input| {
                prop_assert!(input < 50);
                Ok(())
            });
        });
        let text = *found.unwrap_err().downcast::<String>().unwrap();
        assert!(text.contains("the smallest input: 50"), "{text}");
        assert!(text.contains(SEED), "{text}");
    }

    #[test]
    fn a_panic_of_a_reader_is_a_failure_too() {
        let found = std::panic::catch_unwind(|| {
            Class::new("a reader that panics", 1).check(&(0..100_u8), |input| {
                assert!(input < 90, "ninety");
                Ok(())
            });
        });
        let text = *found.unwrap_err().downcast::<String>().unwrap();
        assert!(text.contains("ninety"), "{text}");
    }
}
