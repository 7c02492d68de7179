//! The results of a search as one HTML file that includes the thumbnails.

use std::path::Path;

use super::pictures::Pictures;
use super::search::{Found, Query};
use crate::data::file_name;
use crate::pages::{Thumbnails, base64, document, escape, grouped, push};
use crate::{Error, Result};
use ddtas_io::files::write_atomic;

/// Sides of the thumbnails of queries and answers, in pixels.
const QUERY: usize = 240;
const ANSWER: usize = 160;

const STYLE: &str = include_str!("sheet.css");

/// Writes the contact sheet of a search. A picture that is no longer at its path is shown as a frame with its name.
///
/// # Errors
/// [`Error::Image`](crate::Error::Image) if a query can no longer be read; [`Io`](ddtas_io::Error::Io) if the file
/// cannot be written.
pub fn write(found: &Found, path: &Path) -> Result<()> {
    let mut thumbnails = (Thumbnails::new(QUERY)?, Thumbnails::new(ANSWER)?);
    let title = match &found.queries[..] {
        [query] => format!("Nearest to {}", file_name(&query.path)),
        queries => format!("Nearest to {} pictures", queries.len()),
    };
    let mut body = format!("<style>\n{STYLE}</style>\n");
    push(&mut body, &format!("<header><h1>{}</h1>", escape(&title)));
    push(
        &mut body,
        &format!(
            "<p>Among {} pictures, the most similar first, with the cosine similarity of their embeddings.</p></header>",
            grouped(found.gallery)
        ),
    );
    for query in &found.queries {
        section(&mut body, query, &mut thumbnails)?;
    }
    Ok(write_atomic(path, document(&title, &body).as_bytes())?)
}

fn section(body: &mut String, query: &Query, thumbnails: &mut (Thumbnails, Thumbnails)) -> Result<()> {
    let name = escape(&query.path.display().to_string());
    let picture = Pictures::of(std::slice::from_ref(&query.path)).split.picture(0)?;
    push(body, "<section class=\"sheet\">");
    push(
        body,
        &format!(
            "<figure class=\"wanted\">{}<figcaption>{name}</figcaption></figure>",
            image(&base64(&thumbnails.0.of(&picture)?)?, "query")
        ),
    );
    push(body, "<div class=\"answers\">");
    for (rank, answer) in query.answers.iter().enumerate() {
        let read = |path| match Pictures::of(std::slice::from_ref(path)).split.picture(0) {
            Ok(picture) => Ok(Some(picture)),
            Err(Error::Image { .. }) => Ok(None),
            Err(error) => Err(error),
        };
        let picture = answer.path.as_ref().map_or(Ok(None), read)?;
        let shown = match &picture {
            Some(picture) => image(&base64(&thumbnails.1.of(picture)?)?, ""),
            None => "<div class=\"missing\">no picture</div>".to_owned(),
        };
        let (name, share) = (escape(&answer.name), 100.0 * answer.similarity.clamp(0.0, 1.0));
        push(
            body,
            &format!(
                "<figure>{shown}<div class=\"bar\"><i style=\"width:{share:.1}%\"></i></div>\
                 <figcaption title=\"{name}\"><b>{}</b> <span>{:.3}</span> {name}{}</figcaption></figure>",
                rank + 1,
                answer.similarity,
                if answer.itself { " (the query itself)" } else { "" }
            ),
        );
    }
    push(body, "</div></section>");
    Ok(())
}

fn image(png: &str, alt: &str) -> String {
    format!("<img alt=\"{alt}\" src=\"data:image/png;base64,{png}\">")
}
