//! Flink's names of types, as Arrow types.

use std::sync::Arc;

use arrow::datatypes::{DECIMAL128_MAX_PRECISION, DataType, Field, Fields, TimeUnit};
use datafusion_sql::sqlparser::{
    parser::{Parser, ParserError},
    tokenizer::{Token, TokenWithSpan},
};
use floodmark_dataflow::connector::Location;

use crate::error::{SqlError, start};

const KNOWN: &[&str] = &[
    "BOOLEAN",
    "TINYINT",
    "SMALLINT",
    "INT",
    "INTEGER",
    "BIGINT",
    "FLOAT",
    "DOUBLE",
    "DECIMAL",
    "STRING",
    "VARCHAR",
    "CHAR",
    "BYTES",
    "VARBINARY",
    "BINARY",
    "DATE",
    "TIME",
    "TIMESTAMP",
    "TIMESTAMP_LTZ",
    "ROW",
    "ARRAY",
    "MAP",
];

/// Parses a type.
pub(super) fn parse(parser: &mut Parser<'_>, end: Location) -> Result<DataType, SqlError> {
    let token = parser.next_token();
    let location = if token.span.start.line == 0 { end } else { start(token.span) };
    let tried = |e: ParserError| SqlError::of_parser(&e, end);
    let Token::Word(word) = &token.token else {
        return Err(SqlError::at(location, format!("syntax error: expected a type, found {}", token.token)));
    };
    Ok(match word.value.to_uppercase().as_str() {
        "BOOLEAN" => DataType::Boolean,
        "TINYINT" => DataType::Int8,
        "SMALLINT" => DataType::Int16,
        "INT" | "INTEGER" => DataType::Int32,
        "BIGINT" => DataType::Int64,
        "FLOAT" => DataType::Float32,
        "DOUBLE" => {
            super::is_word(Some(&parser.peek_token()), "PRECISION").then(|| parser.next_token());
            DataType::Float64
        }
        "DECIMAL" | "NUMERIC" | "DEC" => {
            let sizes = sizes(parser, end)?;
            let (precision, scale) = (sizes.first().copied().unwrap_or(10), sizes.get(1).copied().unwrap_or(0));
            if precision == 0 || precision > u64::from(DECIMAL128_MAX_PRECISION) || scale > precision {
                return Err(SqlError::at(location, format!("DECIMAL({precision}, {scale}) is out of range"))
                    .help("precision is 1 to 38, scale 0 to precision"));
            }
            DataType::Decimal128(precision as u8, scale as i8)
        }
        "STRING" => DataType::Utf8,
        "VARCHAR" | "CHAR" => {
            sizes(parser, end)?;
            DataType::Utf8
        }
        "BYTES" => DataType::Binary,
        "VARBINARY" | "BINARY" => {
            sizes(parser, end)?;
            DataType::Binary
        }
        "DATE" => DataType::Date32,
        "TIME" => {
            sizes(parser, end)?;
            DataType::Time32(TimeUnit::Millisecond)
        }
        "TIMESTAMP" => {
            let unit = unit(&sizes(parser, end)?, location)?;
            let words = |parser: &Parser<'_>, words: &[&str]| {
                words.iter().enumerate().all(|(i, w)| super::is_word(Some(&parser.peek_nth_token(i)), w))
            };
            if words(parser, &["WITH", "LOCAL", "TIME", "ZONE"]) {
                (0..4).for_each(|_| drop(parser.next_token()));
                return Ok(DataType::Timestamp(unit, Some("UTC".into())));
            }
            if words(parser, &["WITHOUT", "TIME", "ZONE"]) {
                (0..3).for_each(|_| drop(parser.next_token()));
            }
            DataType::Timestamp(unit, None)
        }
        "TIMESTAMP_LTZ" => DataType::Timestamp(unit(&sizes(parser, end)?, location)?, Some("UTC".into())),
        "ROW" => DataType::Struct(row(parser, end)?),
        "ARRAY" => {
            parser.expect_token(&Token::Lt).map_err(tried)?;
            let item = parse(parser, end)?;
            close(parser, end)?;
            DataType::List(Arc::new(Field::new_list_field(item, true)))
        }
        "MAP" => {
            parser.expect_token(&Token::Lt).map_err(tried)?;
            let key = parse(parser, end)?;
            parser.expect_token(&Token::Comma).map_err(tried)?;
            let value = parse(parser, end)?;
            close(parser, end)?;
            let fields = Fields::from(vec![Field::new("keys", key, false), Field::new("values", value, true)]);
            DataType::Map(Arc::new(Field::new("entries", DataType::Struct(fields), false)), false)
        }
        other => {
            return Err(SqlError::at(location, format!("unknown type {other}")).suggest(other, KNOWN.iter().copied()));
        }
    })
}

fn unit(sizes: &[u64], location: Location) -> Result<TimeUnit, SqlError> {
    match sizes.first().copied().unwrap_or(6) {
        0..=3 => Ok(TimeUnit::Millisecond),
        4..=6 => Ok(TimeUnit::Microsecond),
        7..=9 => Ok(TimeUnit::Nanosecond),
        other => Err(SqlError::at(location, format!("a timestamp's precision is 0 to 9, not {other}"))),
    }
}

/// `(10, 2)`, if there.
fn sizes(parser: &mut Parser<'_>, end: Location) -> Result<Vec<u64>, SqlError> {
    let tried = |e: ParserError| SqlError::of_parser(&e, end);
    let mut sizes = Vec::new();
    if parser.consume_token(&Token::LParen) {
        loop {
            sizes.push(parser.parse_literal_uint().map_err(tried)?);
            if !parser.consume_token(&Token::Comma) {
                break;
            }
        }
        parser.expect_token(&Token::RParen).map_err(tried)?;
    }
    Ok(sizes)
}

/// `<a INT, b ROW<c STRING>>`, or with parentheses.
fn row(parser: &mut Parser<'_>, end: Location) -> Result<Fields, SqlError> {
    let tried = |e: ParserError| SqlError::of_parser(&e, end);
    let parentheses = parser.consume_token(&Token::LParen);
    if !parentheses {
        parser.expect_token(&Token::Lt).map_err(tried)?;
    }
    let mut fields = Vec::new();
    loop {
        let name = parser.parse_identifier().map_err(tried)?.value;
        let data_type = parse(parser, end)?;
        let not_null = super::is_word(Some(&parser.peek_token()), "NOT");
        if not_null {
            parser.next_token();
            parser.next_token();
        }
        fields.push(Field::new(name, data_type, true));
        if !parser.consume_token(&Token::Comma) {
            break;
        }
    }
    if parentheses {
        parser.expect_token(&Token::RParen).map_err(tried)?;
    } else {
        close(parser, end)?;
    }
    Ok(fields.into())
}

/// The end of `<…>`. Two of them in a row arrive as one token: see [`split_shifts`].
fn close(parser: &mut Parser<'_>, end: Location) -> Result<(), SqlError> {
    parser.expect_token(&Token::Gt).map(drop).map_err(|e| SqlError::of_parser(&e, end))
}

/// Cuts `>>` in two where it closes two types: `ROW<a ROW<b INT>>`.
pub(super) fn split_shifts(tokens: &[TokenWithSpan]) -> Vec<TokenWithSpan> {
    let generic = |token: &TokenWithSpan| ["ROW", "ARRAY", "MAP"].iter().any(|w| super::is_word(Some(token), w));
    let mut depth = 0_usize;
    let mut split: Vec<TokenWithSpan> = Vec::with_capacity(tokens.len());
    for token in tokens {
        match token.token {
            Token::Lt if split.last().is_some_and(generic) => depth += 1,
            Token::Gt => depth = depth.saturating_sub(1),
            Token::ShiftRight if depth >= 2 => {
                depth -= 2;
                split.extend([(); 2].map(|()| TokenWithSpan { token: Token::Gt, span: token.span }));
                continue;
            }
            _ => {}
        }
        split.push(token.clone());
    }
    split
}
