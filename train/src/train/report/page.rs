//! What every page of ddtas is made of: one file, nothing fetched.

use std::fmt::Write;

const STYLE: &str = include_str!("report.css");

/// A whole page around `body`.
pub(crate) fn document(title: &str, body: &str) -> String {
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{}</title>\n<style>\n{STYLE}</style></head>\n<body><main>\n{body}\n\
         <footer>Written by ddtas {}.</footer>\n</main></body></html>\n",
        escape(title),
        env!("CARGO_PKG_VERSION")
    )
}

/// Opens a section; the caller closes it.
pub(crate) fn section(body: &mut String, title: &str, note: &str) {
    push(body, &format!("<section><h2>{title}</h2><p>{note}</p>"));
}

/// Adds a line.
pub(crate) fn push(body: &mut String, text: &str) {
    body.push_str(text);
    body.push('\n');
}

/// 12345 as 12,345.
pub(crate) fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// File and class names come from outside: anything may be in them.
pub(crate) fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' | '<' | '>' | '"' | '\'' => {
                // Writing to a string cannot fail.
                let _ = write!(safe, "&#{};", u32::from(character));
            }
            other => safe.push(other),
        }
    }
    safe
}
