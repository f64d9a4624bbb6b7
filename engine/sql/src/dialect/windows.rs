//! Window table functions: `TABLE(TUMBLE(TABLE t, DESCRIPTOR(c), INTERVAL '10' SECOND))`.
//!
//! sqlparser has no `TABLE t` arguments, so calls are cut out of the tokens before it sees them: a generated name stands in
//! for each, which the planner resolves.

use datafusion_sql::sqlparser::{
    ast::Ident,
    keywords::Keyword,
    parser::{Parser, ParserError},
    tokenizer::{Token, TokenWithSpan, Word},
};
use floodmark_dataflow::connector::Location;

use super::{is_word, parser};
use crate::error::{SqlError, start};

/// A window table function, called.
#[derive(Clone, Debug)]
pub(crate) struct WindowCall {
    /// What stands for the call in its query.
    pub(crate) placeholder: String,
    pub(crate) kind: WindowKind,
    pub(crate) table: String,
    pub(crate) table_location: Location,
    pub(crate) time_column: String,
    pub(crate) time_location: Location,
    /// Milliseconds.
    pub(crate) size: i64,
    /// Milliseconds; equal to `size` for `TUMBLE`.
    pub(crate) slide: i64,
    /// Milliseconds.
    pub(crate) offset: i64,
    pub(crate) location: Location,
}

/// Which function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WindowKind {
    Tumble,
    Hop,
}

const FUNCTIONS: &[&str] = &["TUMBLE", "HOP", "CUMULATE", "SESSION"];

/// Cuts the calls out of a statement's tokens. `next` numbers them over the whole job.
pub(super) fn extract(
    tokens: &[TokenWithSpan],
    next: &mut usize,
) -> Result<(Vec<TokenWithSpan>, Vec<WindowCall>), SqlError> {
    let mut rest = Vec::with_capacity(tokens.len());
    let mut calls = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        let Some((wrapped, function)) = call_at(tokens, at) else {
            rest.push(tokens[at].clone());
            at += 1;
            continue;
        };
        let location = start(tokens[at].span);
        let open = at + if wrapped { 3 } else { 1 };
        let close = closing(tokens, open)
            .ok_or_else(|| SqlError::at(start(tokens[open].span), "syntax error: this parenthesis is never closed"))?;
        let placeholder = format!("$window{next}");
        *next += 1;
        calls.push(Call { parser: parser(tokens[open + 1..close].to_vec()), end: start(tokens[close].span) }.parse(
            &function,
            placeholder.clone(),
            location,
        )?);
        at = close + 1;
        if wrapped {
            if tokens.get(at).map(|t| &t.token) != Some(&Token::RParen) {
                return Err(SqlError::at(
                    start(tokens[close].span),
                    "syntax error: expected ) after the window function",
                ));
            }
            at += 1;
        }
        let word = Word { value: placeholder, quote_style: Some('`'), keyword: Keyword::NoKeyword };
        rest.push(TokenWithSpan { token: Token::Word(word), span: tokens[at - 1].span });
    }
    Ok((rest, calls))
}

/// Whether a call begins here: `TABLE ( TUMBLE (`, or `FROM TUMBLE (`. Tells if it is wrapped, and the function.
fn call_at(tokens: &[TokenWithSpan], at: usize) -> Option<(bool, String)> {
    let function = |at: usize| {
        let name = FUNCTIONS.iter().find(|f| is_word(tokens.get(at), f))?;
        (tokens.get(at + 1)?.token == Token::LParen).then(|| (*name).to_owned())
    };
    if is_word(tokens.get(at), "TABLE") && tokens.get(at + 1)?.token == Token::LParen {
        return function(at + 2).map(|f| (true, f));
    }
    let in_from = at > 0
        && (is_word(tokens.get(at - 1), "FROM")
            || is_word(tokens.get(at - 1), "JOIN")
            || tokens[at - 1].token == Token::Comma);
    // A group window (`GROUP BY TUMBLE(ts, …)`) also follows a comma: only a table makes it a table function.
    let of_table = is_word(tokens.get(at + 2), "TABLE") || is_word(tokens.get(at + 2), "DATA");
    let after_from = in_from && (of_table || !matches!(tokens[at - 1].token, Token::Comma));
    if after_from { function(at).map(|f| (false, f)) } else { None }
}

/// The parenthesis that closes the one at `open`.
fn closing(tokens: &[TokenWithSpan], open: usize) -> Option<usize> {
    let mut depth = 0;
    for (i, token) in tokens.iter().enumerate().skip(open) {
        match token.token {
            Token::LParen => depth += 1,
            Token::RParen => {
                depth -= 1;
                if depth == 0 {
                    return Some(i);
                }
            }
            _ => {}
        }
    }
    None
}

struct Call {
    parser: Parser<'static>,
    end: Location,
}

impl Call {
    fn tried<T>(&self, result: Result<T, ParserError>) -> Result<T, SqlError> {
        result.map_err(|e| SqlError::of_parser(&e, self.end))
    }

    fn here(&self) -> Location {
        let span = self.parser.peek_token().span;
        if span.start.line == 0 { self.end } else { start(span) }
    }

    fn parse(mut self, function: &str, placeholder: String, location: Location) -> Result<WindowCall, SqlError> {
        let kind = match function {
            "TUMBLE" => WindowKind::Tumble,
            "HOP" => WindowKind::Hop,
            other => {
                return Err(
                    SqlError::at(location, format!("{other} windows are not supported yet")).help("TUMBLE and HOP are")
                );
            }
        };
        self.argument_name();
        if is_word(Some(&self.parser.peek_token()), "TABLE") {
            self.parser.next_token();
        }
        let table_location = self.here();
        let table = self.identifier()?;
        let here = self.here();
        if is_word(Some(&self.parser.peek_token()), "PARTITION") {
            return Err(SqlError::at(here, "PARTITION BY in a window function is not supported")
                .help("group by the columns instead"));
        }
        self.comma()?;
        self.argument_name();
        let here = self.here();
        if !is_word(Some(&self.parser.peek_token()), "DESCRIPTOR") {
            return Err(SqlError::at(here, format!("{function} needs a time column")).help("write DESCRIPTOR(column)"));
        }
        self.parser.next_token();
        let result = self.parser.expect_token(&Token::LParen);
        self.tried(result)?;
        let time_location = self.here();
        let time_column = self.identifier()?;
        let result = self.parser.expect_token(&Token::RParen);
        self.tried(result)?;
        let mut lengths = Vec::new();
        while self.parser.consume_token(&Token::Comma) {
            let name = self.argument_name();
            let here = self.here();
            lengths.push((name, self.interval()?, here));
        }
        let end = self.here();
        if self.parser.peek_token().token != Token::EOF {
            return Err(SqlError::at(
                end,
                format!("syntax error: expected , or ), found {}", self.parser.peek_token()),
            ));
        }
        let (size, slide, offset) = sort_lengths(kind, function, &lengths, location)?;
        Ok(WindowCall {
            placeholder,
            kind,
            table,
            table_location,
            time_column,
            time_location,
            size,
            slide,
            offset,
            location,
        })
    }

    /// `SIZE =>`
    fn argument_name(&mut self) -> Option<String> {
        let name = self.parser.peek_token().token.to_string().to_uppercase();
        if self.parser.peek_nth_token(1).token != Token::RArrow {
            return None;
        }
        self.parser.next_token();
        self.parser.next_token();
        Some(name)
    }

    fn identifier(&mut self) -> Result<String, SqlError> {
        let result: Result<Ident, _> = self.parser.parse_identifier();
        self.tried(result).map(|i| i.value)
    }

    fn comma(&mut self) -> Result<(), SqlError> {
        let result = self.parser.expect_token(&Token::Comma);
        self.tried(result).map(drop)
    }

    /// `INTERVAL '10' SECOND`, in milliseconds.
    fn interval(&mut self) -> Result<i64, SqlError> {
        let here = self.here();
        if !is_word(Some(&self.parser.peek_token()), "INTERVAL") {
            return Err(SqlError::at(here, "expected an interval").help("write INTERVAL '10' SECOND"));
        }
        self.parser.next_token();
        let result = self.parser.parse_literal_string();
        let value = self.tried(result)?;
        let unit = self.parser.next_token().token.to_string().to_uppercase();
        let scale = match unit.trim_end_matches('S') {
            "SECOND" => 1000,
            "MINUTE" => 60_000,
            "HOUR" => 3_600_000,
            "DAY" => 86_400_000,
            _ => {
                return Err(SqlError::at(here, format!("an interval of {unit} has no fixed length"))
                    .help("use SECOND, MINUTE, HOUR or DAY"));
            }
        };
        let bad = || SqlError::at(here, format!("'{value}' is not a number of {unit}"));
        let (whole, fraction) = value.trim().split_once('.').unwrap_or((value.trim(), ""));
        let whole: i64 = whole.parse().map_err(|_| bad())?;
        let millis: i64 = if fraction.is_empty() {
            0
        } else if scale == 1000 && fraction.len() <= 3 && whole >= 0 {
            format!("{fraction:0<3}").parse().map_err(|_| bad())?
        } else {
            return Err(bad().help("windows have whole milliseconds"));
        };
        whole.checked_mul(scale).and_then(|w| w.checked_add(millis)).ok_or_else(bad)
    }
}

type Length = (Option<String>, i64, Location);

/// (size, slide, offset), checked.
fn sort_lengths(
    kind: WindowKind,
    function: &str,
    lengths: &[Length],
    location: Location,
) -> Result<(i64, i64, i64), SqlError> {
    let order: &[&str] = match kind {
        WindowKind::Tumble => &["SIZE", "OFFSET"],
        WindowKind::Hop => &["SLIDE", "SIZE", "OFFSET"],
    };
    let mut found = [None; 3];
    for (i, (name, value, here)) in lengths.iter().enumerate() {
        let at = match name {
            Some(name) => order.iter().position(|o| o == name),
            None => (i < order.len()).then_some(i),
        };
        let Some(at) = at else {
            return Err(SqlError::at(*here, format!("{function} has no such argument"))
                .help(format!("it takes the table, DESCRIPTOR(column) and {}", order.join(", "))));
        };
        if *value <= 0 && order[at] != "OFFSET" {
            return Err(SqlError::at(*here, format!("the {} of a window must be positive", order[at].to_lowercase())));
        }
        found[at] = Some(*value);
    }
    let missing = |what: &str| SqlError::at(location, format!("{function} needs a {what}"));
    match kind {
        WindowKind::Tumble => {
            let size = found[0].ok_or_else(|| missing("size"))?;
            Ok((size, size, found[1].unwrap_or(0).rem_euclid(size)))
        }
        WindowKind::Hop => {
            let slide = found[0].ok_or_else(|| missing("slide"))?;
            let size = found[1].ok_or_else(|| missing("size"))?;
            Ok((size, slide, found[2].unwrap_or(0).rem_euclid(slide)))
        }
    }
}
