//! Whatever the agent's files hold, the agent says what is wrong or works.

mod config;
mod journal;
