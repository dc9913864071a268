//! Texts and bytes that readers stumble over, and damage to what is right.

use proptest::{collection::vec, prelude::*, sample::select, string::string_regex};

/// Texts: ordinary ones, all of Unicode, what other readers take for something
/// else, and now and then a very long one.
pub fn texts() -> impl Strategy<Value = String> {
    let odd = vec![
        "",
        " ",
        "\0",
        "\n",
        "\u{7f}",
        "\u{85}\u{2028}\u{2029}",
        "\u{feff}",
        "\u{202e}abc",
        "é\u{301}😀",
        "null",
        "true",
        "-1",
        "0",
        "1e309",
        "NaN",
        "9223372036854775808",
        "18446744073709551616",
        "%s%n",
        "{{ lookup('pipe', 'id') }}",
        "../../etc/passwd",
        "/dev/zero",
        "'; DROP TABLE runs; --",
        "$(id)",
        "]]>",
        "&amp;<x y='",
        "*",
        "[",
        "[a-",
        "**/**",
        "default",
        "web1",
        "s0",
        "before",
        "Europe/Berlin",
    ];
    prop_oneof![
        4 => select(odd).prop_map(str::to_owned),
        4 => r"[a-zA-Z0-9._-]{1,12}",
        3 => any::<String>(),
        2 => vec(any::<char>(), 0..40).prop_map(|chars| chars.into_iter().collect()),
        1 => (select(vec!["a", "é", "\u{1}", "<a>", "*", "[[", "9", "😀", " "]), long())
            .prop_map(|(piece, times)| piece.repeat(times)),
    ]
}

/// How often something is repeated to make it very long.
fn long() -> impl Strategy<Value = usize> {
    prop_oneof![
        8 => 60..300_usize,
        4 => 300..5_000_usize,
        1 => 5_000..200_000_usize,
    ]
}

/// Numbers near the ends of their types, and others.
pub fn numbers() -> impl Strategy<Value = i64> {
    prop_oneof![
        select(vec![
            0,
            1,
            -1,
            i64::MIN,
            i64::MAX,
            i64::MAX - 1,
            i64::from(i32::MIN),
            i64::from(i32::MAX),
            i64::from(u32::MAX),
            315_576_000_000,
            315_576_000_001,
            -315_576_000_001,
            999_999_999,
            1_000_000_000,
        ]),
        any::<i64>(),
        0..100_i64,
    ]
}

/// One change to bytes.
#[derive(Debug, Clone)]
enum Damage {
    Set(usize, u8),
    Flip(usize, u8),
    Cut(usize),
    Remove(usize, usize),
    Insert(usize, Vec<u8>),
    Double(usize, usize),
}

fn damage() -> impl Strategy<Value = Damage> {
    let at = || any::<prop::sample::Index>().prop_map(|index| index.index(1 << 30));
    prop_oneof![
        3 => (at(), any::<u8>()).prop_map(|(at, byte)| Damage::Set(at, byte)),
        3 => (at(), 0..8_u8).prop_map(|(at, bit)| Damage::Flip(at, bit)),
        1 => at().prop_map(Damage::Cut),
        2 => (at(), 1..64_usize).prop_map(|(at, length)| Damage::Remove(at, length)),
        2 => (at(), vec(any::<u8>(), 1..16)).prop_map(|(at, bytes)| Damage::Insert(at, bytes)),
        2 => (at(), 1..256_usize).prop_map(|(at, length)| Damage::Double(at, length)),
    ]
}

fn apply(bytes: &mut Vec<u8>, damage: &Damage) {
    let length = bytes.len();
    let place = |at: usize| if length == 0 { 0 } else { at % length };
    match damage {
        Damage::Set(at, byte) if length > 0 => bytes[place(*at)] = *byte,
        Damage::Flip(at, bit) if length > 0 => bytes[place(*at)] ^= 1 << bit,
        Damage::Set(..) | Damage::Flip(..) => {}
        Damage::Cut(at) => bytes.truncate(place(*at)),
        Damage::Remove(at, count) => {
            let at = place(*at);
            bytes.drain(at..(at + count).min(length));
        }
        Damage::Insert(at, more) => {
            let at = place(*at);
            bytes.splice(at..at, more.iter().copied());
        }
        Damage::Double(at, count) => {
            let at = place(*at);
            let piece = bytes[at..(at + count).min(length)].to_vec();
            bytes.splice(at..at, piece);
        }
    }
}

/// Bytes with a few changes to them.
pub fn damaged(bytes: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    vec(damage(), 1..8).prop_map(move |changes| {
        let mut bytes = bytes.clone();
        for change in &changes {
            apply(&mut bytes, change);
        }
        bytes
    })
}

/// A text with words of it replaced and lines moved, cut or doubled; what is
/// then no UTF-8 any more is replaced.
pub fn damaged_text(text: &str, words: &str) -> impl Strategy<Value = String> + use<> {
    let text = text.to_owned();
    let lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let count = lines.len().max(1);
    let word = string_regex(words).expect("a sound pattern");
    let replaced = (
        vec((0..count, texts().boxed(), any::<bool>()), 1..5),
        vec((0..count, 0..count), 0..3),
        vec(word, 0..3),
    )
        .prop_map(move |(changes, swaps, more)| {
            let mut lines = lines.clone();
            for (at, with, end) in changes {
                if let Some(line) = lines.get_mut(at) {
                    // Behind the key, or in its place.
                    match (line.split_once('='), end) {
                        (Some((key, _)), true) => *line = format!("{key}= {with}"),
                        (Some((_, value)), false) => *line = format!("{with} ={value}"),
                        (None, _) => *line = with,
                    }
                }
            }
            for (from, to) in swaps {
                if from < lines.len() && to < lines.len() {
                    lines.swap(from, to);
                }
            }
            lines.extend(more);
            lines.join("\n")
        });
    prop_oneof![
        replaced,
        damaged(text.into_bytes()).prop_map(|bytes| String::from_utf8_lossy(&bytes).into_owned()),
    ]
}
