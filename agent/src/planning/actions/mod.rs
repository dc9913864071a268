//! One plan a file. Each takes the request's options and the facts and drafts
//! the steps, or refuses with a reason.

pub mod checks;
pub mod cleanup;
pub mod commit;
pub mod confirm;
pub mod create;
pub mod delete;
pub mod kind;
pub mod list;
pub mod mergeable;
pub mod resize;
pub mod revert;
