//! `CREATE TABLE`, `CREATE VIEW`, `INSERT INTO`.

use std::collections::BTreeMap;

use arrow::datatypes::{DataType, Field, FieldRef};
use datafusion_sql::sqlparser::{
    ast,
    keywords::Keyword,
    parser::{Parser, ParserError},
    tokenizer::{Token, TokenWithSpan},
};
use floodmark_dataflow::connector::{Location, OptionValue};

use super::{CreateView, Insert, WindowCall, expect_end, if_not_exists, parser, types};
use crate::error::{SqlError, start};

/// `CREATE TABLE name (…) WITH (…)`
#[derive(Clone, Debug)]
pub(crate) struct CreateTable {
    pub(crate) name: String,
    pub(crate) if_not_exists: bool,
    pub(crate) columns: Vec<TableColumn>,
    pub(crate) watermark: Option<Watermark>,
    pub(crate) primary_key: Vec<(String, Location)>,
    pub(crate) options: BTreeMap<String, OptionValue>,
    pub(crate) location: Location,
}

/// A column of a table.
#[derive(Clone, Debug)]
pub(crate) enum TableColumn {
    /// What the connector brings or takes.
    Physical(FieldRef),
    /// `name AS expr`
    Computed { name: String, expr: Box<ast::Expr>, location: Location },
}

impl TableColumn {
    pub(crate) fn name(&self) -> &str {
        match self {
            Self::Physical(field) => field.name(),
            Self::Computed { name, .. } => name,
        }
    }
}

/// `WATERMARK FOR column AS expr`
#[derive(Clone, Debug)]
pub(crate) struct Watermark {
    pub(crate) column: String,
    pub(crate) expr: Box<ast::Expr>,
    pub(crate) location: Location,
}

pub(super) fn create_table(
    tokens: &[TokenWithSpan],
    location: Location,
    end: Location,
) -> Result<CreateTable, SqlError> {
    let mut parser = parser(types::split_shifts(tokens));
    let table = Ddl { parser: &mut parser, end }.create_table(location)?;
    expect_end(&parser)?;
    Ok(table)
}

pub(super) fn create_view(
    tokens: Vec<TokenWithSpan>,
    windows: Vec<WindowCall>,
    location: Location,
    end: Location,
) -> Result<CreateView, SqlError> {
    let mut parser = parser(tokens);
    let mut ddl = Ddl { parser: &mut parser, end };
    if_not_exists(ddl.parser);
    let (name, _) = ddl.name()?;
    let columns = if ddl.parser.peek_token().token == Token::LParen { ddl.names()? } else { Vec::new() };
    ddl.comment()?;
    ddl.tried(|p| p.expect_keyword(Keyword::AS))?;
    let query = ddl.tried(Parser::parse_query)?;
    expect_end(&parser)?;
    Ok(CreateView { name, columns: columns.into_iter().map(|(name, _)| name).collect(), query, windows, location })
}

pub(super) fn insert(
    tokens: Vec<TokenWithSpan>,
    windows: Vec<WindowCall>,
    location: Location,
    end: Location,
) -> Result<Insert, SqlError> {
    let mut parser = parser(tokens);
    let mut ddl = Ddl { parser: &mut parser, end };
    let (table, table_location) = ddl.name()?;
    let next = ddl.parser.peek_nth_token(1).token;
    let list = ddl.parser.peek_token().token == Token::LParen
        && !matches!(&next, Token::Word(w) if matches!(w.keyword, Keyword::SELECT | Keyword::WITH) && w.quote_style.is_none());
    let columns = if list { ddl.names()? } else { Vec::new() };
    let query = ddl.tried(Parser::parse_query)?;
    expect_end(&parser)?;
    Ok(Insert { table, table_location, columns, query, windows, location })
}

struct Ddl<'p, 'a> {
    parser: &'p mut Parser<'a>,
    end: Location,
}

impl<'a> Ddl<'_, 'a> {
    fn tried<T>(&mut self, parse: impl FnOnce(&mut Parser<'a>) -> Result<T, ParserError>) -> Result<T, SqlError> {
        parse(self.parser).map_err(|e| SqlError::of_parser(&e, self.end))
    }

    fn here(&self) -> Location {
        let span = self.parser.peek_token().span;
        if span.start.line == 0 { self.end } else { start(span) }
    }

    /// A name of one part.
    fn name(&mut self) -> Result<(String, Location), SqlError> {
        let location = self.here();
        let name = self.tried(Parser::parse_identifier)?.value;
        if self.parser.peek_token().token == Token::Period {
            return Err(SqlError::at(location, "tables have names of one part: there are no catalogs or databases"));
        }
        Ok((name, location))
    }

    fn names(&mut self) -> Result<Vec<(String, Location)>, SqlError> {
        self.tried(|p| p.expect_token(&Token::LParen))?;
        let mut names = vec![self.name()?];
        while self.parser.consume_token(&Token::Comma) {
            names.push(self.name()?);
        }
        self.tried(|p| p.expect_token(&Token::RParen))?;
        Ok(names)
    }

    fn comment(&mut self) -> Result<(), SqlError> {
        if self.parser.parse_keyword(Keyword::COMMENT) {
            self.tried(Parser::parse_literal_string)?;
        }
        Ok(())
    }

    fn word(&mut self, word: &str) -> bool {
        let found = super::is_word(Some(&self.parser.peek_token()), word);
        if found {
            self.parser.next_token();
        }
        found
    }

    fn create_table(&mut self, location: Location) -> Result<CreateTable, SqlError> {
        let if_not_exists = if_not_exists(self.parser);
        let (name, _) = self.name()?;
        let mut table = CreateTable {
            name,
            if_not_exists,
            columns: Vec::new(),
            watermark: None,
            primary_key: Vec::new(),
            options: BTreeMap::new(),
            location,
        };
        self.tried(|p| p.expect_token(&Token::LParen))?;
        loop {
            self.element(&mut table)?;
            if !self.parser.consume_token(&Token::Comma) {
                break;
            }
        }
        self.tried(|p| p.expect_token(&Token::RParen))?;
        self.comment()?;
        let here = self.here();
        if self.parser.parse_keyword(Keyword::PARTITIONED) || self.parser.parse_keyword(Keyword::LIKE) {
            return Err(SqlError::at(here, "PARTITIONED BY and LIKE are not supported"));
        }
        self.tried(|p| p.expect_keyword(Keyword::WITH))?;
        self.options(&mut table)?;
        Self::check(&table)?;
        Ok(table)
    }

    fn element(&mut self, table: &mut CreateTable) -> Result<(), SqlError> {
        let location = self.here();
        if self.word("WATERMARK") {
            self.tried(|p| p.expect_keyword(Keyword::FOR))?;
            let (column, _) = self.name()?;
            self.tried(|p| p.expect_keyword(Keyword::AS))?;
            let expr = Box::new(self.tried(Parser::parse_expr)?);
            if table.watermark.is_some() {
                return Err(SqlError::at(location, "a table has one watermark"));
            }
            table.watermark = Some(Watermark { column, expr, location });
            return Ok(());
        }
        if self.parser.parse_keyword(Keyword::CONSTRAINT) {
            self.name()?;
        }
        if self.parser.parse_keywords(&[Keyword::PRIMARY, Keyword::KEY]) {
            if !table.primary_key.is_empty() {
                return Err(SqlError::at(location, "a table has one primary key"));
            }
            table.primary_key = self.names()?;
            return self.not_enforced(location);
        }
        self.column(table)
    }

    fn not_enforced(&mut self, location: Location) -> Result<(), SqlError> {
        if self.parser.parse_keywords(&[Keyword::NOT, Keyword::ENFORCED]) {
            return Ok(());
        }
        Err(SqlError::at(location, "a primary key is not checked by Floodmark")
            .help("write PRIMARY KEY (…) NOT ENFORCED"))
    }

    fn column(&mut self, table: &mut CreateTable) -> Result<(), SqlError> {
        let (name, location) = self.name()?;
        if name.starts_with('$') {
            return Err(SqlError::at(location, "names of columns can't begin with '$'"));
        }
        if self.parser.parse_keyword(Keyword::AS) {
            let expr = Box::new(self.tried(Parser::parse_expr)?);
            table.columns.push(TableColumn::Computed { name, expr, location });
            return self.comment();
        }
        let data_type = types::parse(self.parser, self.end)?;
        let here = self.here();
        if self.word("METADATA") {
            return Err(SqlError::at(here, "METADATA columns are not supported"));
        }
        let mut nullable = true;
        if self.parser.parse_keywords(&[Keyword::NOT, Keyword::NULL]) {
            nullable = false;
        } else {
            let _ = self.parser.parse_keyword(Keyword::NULL);
        }
        if self.parser.parse_keywords(&[Keyword::PRIMARY, Keyword::KEY]) {
            if !table.primary_key.is_empty() {
                return Err(SqlError::at(here, "a table has one primary key"));
            }
            table.primary_key.push((name.clone(), location));
            self.not_enforced(here)?;
        }
        self.comment()?;
        table.columns.push(TableColumn::Physical(Field::new(name, data_type, nullable).into()));
        Ok(())
    }

    fn options(&mut self, table: &mut CreateTable) -> Result<(), SqlError> {
        self.tried(|p| p.expect_token(&Token::LParen))?;
        loop {
            let location = self.here();
            let name = self.tried(Parser::parse_literal_string)?;
            self.tried(|p| p.expect_token(&Token::Eq))?;
            let value = self.tried(Parser::parse_literal_string)?;
            let value = OptionValue::parse(&value, location)
                .map_err(|e| SqlError::at(location, format!("table '{}': option '{name}': {e}", table.name)))?;
            if table.options.insert(name.clone(), value).is_some() {
                return Err(SqlError::at(location, format!("option '{name}' is given twice")));
            }
            if !self.parser.consume_token(&Token::Comma) {
                break;
            }
        }
        self.tried(|p| p.expect_token(&Token::RParen))?;
        Ok(())
    }

    fn check(table: &CreateTable) -> Result<(), SqlError> {
        let names: Vec<&str> = table.columns.iter().map(TableColumn::name).collect();
        for (i, name) in names.iter().enumerate() {
            if names[..i].contains(name) {
                return Err(SqlError::at(table.location, format!("table '{}' has two columns '{name}'", table.name)));
            }
        }
        for (key, location) in &table.primary_key {
            if !names.contains(&key.as_str()) {
                let error = SqlError::at(*location, format!("unknown column '{key}' in the primary key"));
                return Err(error.suggest(key, names));
            }
        }
        if let Some(watermark) = &table.watermark {
            if !names.contains(&watermark.column.as_str()) {
                let error = SqlError::at(watermark.location, format!("unknown column '{}'", watermark.column));
                return Err(error.suggest(&watermark.column, names));
            }
            let time = table.columns.iter().find(|c| c.name() == watermark.column);
            if let Some(TableColumn::Physical(field)) = time
                && !matches!(field.data_type(), DataType::Timestamp(..))
            {
                let message =
                    format!("a watermark needs a TIMESTAMP column; '{}' is {}", field.name(), field.data_type());
                return Err(SqlError::at(watermark.location, message));
            }
        }
        Ok(())
    }
}
