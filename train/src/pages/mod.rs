//! Parts of the HTML pages: the report of a run, the results of an evaluation and of a search. Each page is a
//! single file without external resources.

pub(crate) mod lettering;
mod thumbnails;

use std::fmt::Write;

pub(crate) use thumbnails::{Thumbnails, base64, encode};

const STYLE: &str = include_str!("page.css");

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

/// Adds a table of shares in per cent: heads, and rows with a name and a value for each column, the highest bold.
pub(crate) fn figures(body: &mut String, heads: &[String], rows: &[(String, Vec<Option<f64>>)]) {
    push(body, "<div class=\"scroll\"><table class=\"recall\"><thead><tr><th></th>");
    heads.iter().for_each(|head| push(body, &format!("<th>{}</th>", escape(head))));
    push(body, "</tr></thead><tbody>");
    let highest = |column: usize| rows.iter().filter_map(|row| row.1[column]).fold(0.0, f64::max);
    for (name, values) in rows {
        push(body, &format!("<tr><th>{}</th>", escape(name)));
        for (column, value) in values.iter().enumerate() {
            push(
                body,
                &match value {
                    Some(value) if *value >= highest(column) => {
                        format!("<td><b>{}</b></td>", percent(*value))
                    }
                    Some(value) => format!("<td>{}</td>", percent(*value)),
                    None => "<td></td>".to_owned(),
                },
            );
        }
        push(body, "</tr>");
    }
    push(body, "</tbody></table></div>");
}

/// A share in per cent.
pub(crate) fn percent(share: f64) -> String {
    format!("{:.1}", 100.0 * share)
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

/// Escapes `text` for HTML, since file and class names may contain anything.
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
