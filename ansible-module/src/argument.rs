//! One option of a module, as data.
//!
//! Purpose: everything that is true of an option stands in one place, so that
//! parsing, defaults, coercion, the refusal of what does not belong, and the
//! documentation cannot say different things.
//!
//! Invariants: a default is of the option's own kind and, where there are
//! choices, one of them; a required option has no default.

use serde_json::{Value, json};

/// What an option's value is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Text.
    Text,
    /// A yes or a no; Ansible's words for them count.
    Flag,
    /// A whole number, not negative.
    Number,
    /// A length of time, in seconds where it is a bare number.
    Duration,
    /// A number of bytes, such as `20G`.
    Size,
    /// A number of bytes a second, such as `100M`.
    Rate,
    /// Texts; a comma separates them where they come as one.
    List,
}

impl Kind {
    /// Ansible's word for it. Sizes and durations are text there.
    pub fn ansible_type(self) -> &'static str {
        match self {
            Kind::Text | Kind::Duration | Kind::Size | Kind::Rate => "str",
            Kind::Flag => "bool",
            Kind::Number => "int",
            Kind::List => "list",
        }
    }
}

/// What holds when an option is not given.
#[derive(Clone, Copy, Debug)]
pub enum Fallback {
    /// Nothing.
    Absent,
    /// This text, to be read as the option's kind.
    Text(&'static str),
    /// This yes or no.
    Flag(bool),
    /// This number.
    Number(u64),
    /// These texts.
    List(&'static [&'static str]),
}

/// One option.
#[derive(Clone, Copy, Debug)]
pub struct Argument {
    /// Its name in a playbook.
    pub name: &'static str,
    /// What its value is.
    pub kind: Kind,
    /// What holds when it is not given.
    pub default: Fallback,
    /// The only values it takes; any when empty.
    pub choices: &'static [&'static str],
    /// Other names for it.
    pub aliases: &'static [&'static str],
    /// Whether a task must give it.
    pub required: bool,
    /// The actions it is for; all when empty.
    pub actions: &'static [&'static str],
    /// What it does, in one line.
    pub doc: &'static str,
}

impl Argument {
    /// An optional option for all actions, without default.
    pub const fn new(name: &'static str, kind: Kind, doc: &'static str) -> Self {
        Argument {
            name,
            kind,
            default: Fallback::Absent,
            choices: &[],
            aliases: &[],
            required: false,
            actions: &[],
            doc,
        }
    }

    /// The same with a default.
    pub const fn or(mut self, default: Fallback) -> Self {
        self.default = default;
        self
    }

    /// The same, taking these values only.
    pub const fn one_of(mut self, choices: &'static [&'static str]) -> Self {
        self.choices = choices;
        self
    }

    /// The same with other names.
    pub const fn also_called(mut self, aliases: &'static [&'static str]) -> Self {
        self.aliases = aliases;
        self
    }

    /// The same, but a task must give it.
    pub const fn required(mut self) -> Self {
        self.required = true;
        self
    }

    /// The same for these actions alone.
    pub const fn only_for(mut self, actions: &'static [&'static str]) -> Self {
        self.actions = actions;
        self
    }

    /// Whether it may be given with this action.
    pub fn belongs_to(&self, action: &str) -> bool {
        self.actions.is_empty() || self.actions.contains(&action)
    }

    /// The default as JSON; null where there is none.
    pub fn default_json(&self) -> Value {
        match self.default {
            Fallback::Absent => Value::Null,
            Fallback::Text(text) => json!(text),
            Fallback::Flag(flag) => json!(flag),
            Fallback::Number(number) => json!(number),
            Fallback::List(list) => json!(list),
        }
    }
}

/// A table as JSON, for whoever holds the documentation against it.
pub fn describe(module: &str, table: &[Argument]) -> Value {
    let options: serde_json::Map<String, Value> = table
        .iter()
        .map(|argument| {
            let mut option = json!({
                "type": argument.kind.ansible_type(),
                "required": argument.required,
                "default": argument.default_json(),
                "choices": argument.choices,
                "aliases": argument.aliases,
                "actions": argument.actions,
                "description": argument.doc,
            });
            if argument.kind == Kind::List {
                option["elements"] = json!("str");
            }
            (argument.name.to_owned(), option)
        })
        .collect();
    json!({ "module": module, "options": options })
}
