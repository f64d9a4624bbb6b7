//! Our dialect of SQL: Flink's, as far as we go. Text to statements, without looking at what names mean.
//!
//! Statements are cut at the tokens and parsed here, expressions and queries by sqlparser. Tokens keep their places, so that
//! every error can say where.

use datafusion_sql::sqlparser::{
    ast,
    dialect::Dialect,
    keywords::Keyword,
    parser::Parser,
    tokenizer::{Token, TokenWithSpan, Tokenizer},
};
use floodmark_dataflow::connector::Location;

use crate::error::{SqlError, start};

pub(crate) mod ddl;
pub(crate) mod refuse;
mod types;
pub(crate) mod windows;

pub(crate) use self::{
    ddl::CreateTable,
    windows::{WindowCall, WindowKind},
};

/// A statement of a job.
#[derive(Clone, Debug)]
pub(crate) enum Statement {
    /// `CREATE TABLE`
    CreateTable(CreateTable),
    /// `CREATE VIEW`
    CreateView(CreateView),
    /// `INSERT INTO`
    Insert(Insert),
}

/// `CREATE VIEW name (columns) AS query`
#[derive(Clone, Debug)]
pub(crate) struct CreateView {
    pub(crate) name: String,
    pub(crate) columns: Vec<String>,
    pub(crate) query: Box<ast::Query>,
    /// Window table functions of the query, by the names that stand for them in it.
    pub(crate) windows: Vec<WindowCall>,
    pub(crate) location: Location,
}

/// `INSERT INTO table (columns) query`
#[derive(Clone, Debug)]
pub(crate) struct Insert {
    pub(crate) table: String,
    pub(crate) table_location: Location,
    pub(crate) columns: Vec<(String, Location)>,
    pub(crate) query: Box<ast::Query>,
    pub(crate) windows: Vec<WindowCall>,
    pub(crate) location: Location,
}

/// The dialect as sqlparser sees it.
#[derive(Debug)]
pub(crate) struct FloodmarkDialect;

impl Dialect for FloodmarkDialect {
    fn is_identifier_start(&self, ch: char) -> bool {
        ch.is_alphabetic() || ch == '_' || ch == '$'
    }

    fn is_identifier_part(&self, ch: char) -> bool {
        self.is_identifier_start(ch) || ch.is_ascii_digit()
    }

    fn supports_filter_during_aggregation(&self) -> bool {
        true
    }

    fn supports_group_by_expr(&self) -> bool {
        true
    }

    fn supports_named_fn_args_with_rarrow_operator(&self) -> bool {
        true
    }
}

/// Parses the SQL of a job.
pub(crate) fn parse(sql: &str) -> Result<Vec<Statement>, SqlError> {
    let tokens = Tokenizer::new(&FloodmarkDialect, sql)
        .tokenize_with_location()
        .map_err(|e| SqlError::at(start_of(&e), format!("syntax error: {}", e.message)))?;
    let mut statements = Vec::new();
    let mut windows = 0;
    for tokens in tokens.split(|t| t.token == Token::SemiColon) {
        let tokens: Vec<_> = tokens.iter().filter(|t| !is_blank(&t.token)).cloned().collect();
        let tokens = without_statement_set(&tokens);
        if !tokens.is_empty() {
            statements.push(statement(tokens, &mut windows)?);
        }
    }
    Ok(statements)
}

fn start_of(error: &datafusion_sql::sqlparser::tokenizer::TokenizerError) -> Location {
    Location { line: error.location.line, column: error.location.column }
}

fn is_blank(token: &Token) -> bool {
    matches!(token, Token::Whitespace(_))
}

fn is_word(token: Option<&TokenWithSpan>, word: &str) -> bool {
    matches!(token.map(|t| &t.token), Some(Token::Word(w)) if w.quote_style.is_none() && w.value.eq_ignore_ascii_case(word))
}

fn begins_with(tokens: &[TokenWithSpan], words: &[&str]) -> bool {
    words.iter().enumerate().all(|(i, word)| is_word(tokens.get(i), word))
}

/// `EXECUTE STATEMENT SET BEGIN … END` groups inserts; all inserts of a job run together anyway.
fn without_statement_set(tokens: &[TokenWithSpan]) -> &[TokenWithSpan] {
    if begins_with(tokens, &["EXECUTE", "STATEMENT", "SET", "BEGIN"]) {
        return &tokens[4..];
    }
    if begins_with(tokens, &["BEGIN", "STATEMENT", "SET"]) {
        return &tokens[3..];
    }
    if tokens.len() == 1 && begins_with(tokens, &["END"]) {
        return &[];
    }
    tokens
}

fn statement(tokens: &[TokenWithSpan], windows: &mut usize) -> Result<Statement, SqlError> {
    let location = tokens.first().map_or(Location::default(), |t| start(t.span));
    let end = tokens.last().map_or(location, |t| Location { line: t.span.end.line, column: t.span.end.column });
    let skip_temporary = |tokens: &[TokenWithSpan]| if is_word(tokens.get(1), "TEMPORARY") { 2 } else { 1 };
    let kind = skip_temporary(tokens);
    if is_word(tokens.first(), "CREATE") && is_word(tokens.get(kind), "TABLE") {
        return ddl::create_table(&tokens[kind + 1..], location, end).map(Statement::CreateTable);
    }
    if is_word(tokens.first(), "CREATE") && is_word(tokens.get(kind), "VIEW") {
        let (tokens, windows) = windows::extract(&tokens[kind + 1..], windows)?;
        return ddl::create_view(tokens, windows, location, end).map(Statement::CreateView);
    }
    if begins_with(tokens, &["INSERT", "INTO"]) {
        let (tokens, windows) = windows::extract(&tokens[2..], windows)?;
        return ddl::insert(tokens, windows, location, end).map(Statement::Insert);
    }
    let words: Vec<String> = tokens.iter().take(2).map(|t| t.token.to_string().to_uppercase()).collect();
    let first = words.first().map_or("", String::as_str);
    let refused = |what: &str, help: &str| Err(SqlError::at(location, format!("{what} is not supported")).help(help));
    match first {
        "SELECT" | "WITH" => Err(SqlError::at(location, "a query by itself has nowhere to put its result")
            .help("write INSERT INTO … SELECT …; the connector 'print' shows rows")),
        "SET" | "RESET" | "USE" => refused(first, "options of a job stand in its manifest"),
        "CREATE" => refused(
            &format!("CREATE {}", words.get(1).map_or("", String::as_str)),
            "a job has CREATE TABLE, CREATE VIEW and INSERT INTO",
        ),
        _ if matches!(tokens[0].token, Token::Word(_)) => {
            refused(first, "a job has CREATE TABLE, CREATE VIEW and INSERT INTO")
        }
        _ => Err(SqlError::at(location, format!("syntax error: expected a statement, found {first}"))),
    }
}

/// A parser over some tokens.
fn parser(tokens: Vec<TokenWithSpan>) -> Parser<'static> {
    Parser::new(&FloodmarkDialect).with_tokens_with_locations(tokens)
}

fn expect_end(parser: &Parser<'_>) -> Result<(), SqlError> {
    let next = parser.peek_token();
    if next.token == Token::EOF {
        return Ok(());
    }
    Err(SqlError::at(start(next.span), format!("syntax error: expected ; or the end, found {}", next.token)))
}

/// Consumes `IF NOT EXISTS`.
fn if_not_exists(parser: &mut Parser<'_>) -> bool {
    parser.parse_keywords(&[Keyword::IF, Keyword::NOT, Keyword::EXISTS])
}
