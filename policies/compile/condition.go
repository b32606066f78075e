// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/operators"
	"cel.dev/cel-go/common/overloads"
	"cel.dev/cel-go/common/types"

	"github.com/sallyport-dev/sallyport/policies/load"
)

// Bounds of a condition's text.
const (
	maxConditionChars = 4096
	maxConditionNodes = 1000
	maxConditionDepth = 32
)

// Condition is a compiled `when`: an expression in the Common Expression
// Language over
//
//	request.method, request.path (decoded, without query), request.host: string
//	request.content_length: int, bytes, -1 where the body is chunked
//	request.headers: map(string, string), read as request.headers['Name'] or 'Name' in request.headers
//	source.id, source.name, source.namespace: string, "" where no identity was proven
//	token.sub, token.iss, token.client_id: string; token.scopes, token.groups: list(string)
//	token.claims: map(string, dyn)
//	params: map(string, string), the values of the path template, decoded
//	time: timestamp
type Condition struct {
	// Text is the expression as written.
	Text string

	program   cel.Program
	headers   []string // as written
	params    []string
	prices    prices
	usesToken bool
	least     uint64 // what an evaluation costs at least
}

// What CEL itself says of an error may hold a parameter's or a claim's value;
// these do not.
var (
	errNotBool   = errors.New("evaluate condition: the result is not a bool")
	errMissing   = errors.New("evaluate condition: a claim, header or parameter that it reads is not there")
	errCost      = errors.New("evaluate condition: it costs more than the limit")
	errOperation = errors.New("evaluate condition: an operation on these values is not possible")
)

// ErrBudget says that a condition was not evaluated, because those before it
// have cost what the conditions of one request may cost.
var ErrBudget = errors.New("evaluate condition: the budget of the request's conditions is used up")

func evalError(err error) error {
	switch text := err.Error(); {
	case strings.Contains(text, "no such key"), strings.Contains(text, "no such attribute"):
		return errMissing
	case strings.Contains(text, "cost limit"):
		return errCost
	}
	return errOperation
}

// Eval says whether the condition holds. An error (a claim that is not
// there, a header that came twice, a cost over the limit, a budget that is
// used up) means that it cannot be said: an allow rule then does not allow, a
// deny rule denies.
func (c *Condition) Eval(a *Activation) (bool, error) {
	if a.spent >= maxRequestCost {
		return false, ErrBudget
	}
	a.spent += c.overhead(a)
	vars := variables{Activation: a}
	if len(c.headers) > 0 {
		vars.headers = make(map[string]string, len(c.headers))
		for _, name := range c.headers {
			v, n := a.Request.HeaderValue(name)
			if n > 1 {
				return false, fmt.Errorf("evaluate condition: header %s came more than once", name)
			}
			if n == 1 {
				vars.headers[name] = string(v)
			}
		}
	}
	out, details, err := c.program.Eval(&vars)
	if cost := details.ActualCost(); cost != nil {
		a.spent += *cost
	} else { // it broke off; nobody knows where
		a.spent += maxConditionCost
	}
	if err != nil {
		return false, evalError(err)
	}
	b, ok := out.(types.Bool)
	if !ok {
		return false, errNotBool
	}
	return bool(b), nil
}

// variables resolves the names of a condition.
type variables struct {
	*Activation
	headers map[string]string
	values  map[string]string // of the parameters, once asked for
}

// Parent returns nil: there is nothing behind.
func (v *variables) Parent() cel.Activation { return nil }

// ResolveName returns the value of a variable.
func (v *variables) ResolveName(name string) (any, bool) {
	kind, field, _ := strings.Cut(name, ".")
	switch kind {
	case "request":
		return v.request(field)
	case "source":
		return v.source(field)
	case "token":
		return v.token(field)
	case "params":
		return v.params(), field == ""
	case "time":
		return v.Time, field == ""
	}
	return nil, false
}

func (v *variables) request(field string) (any, bool) {
	if v.Request.Method == "" && (field != "host" || v.Request.Host == "") {
		// An opaque connection has no request: what one would be is not
		// known, so that a deny rule that asks for it denies.
		return nil, false
	}
	switch field {
	case "method":
		return v.Request.Method, true
	case "path":
		if v.path == "" {
			v.path = decodeAll(v.Request.Path)
		}
		return v.path, true
	case "host":
		return v.Request.Host, true
	case "content_length":
		return v.Request.ContentLength, true
	case "headers":
		return v.headers, true
	}
	return nil, false
}

func (v *variables) source(field string) (any, bool) {
	var id, name, namespace string
	if s := v.Source; s != nil {
		id, name, namespace = s.ID, s.Name, s.Namespace
		if v.Request.Peer.ID != "" {
			id = v.Request.Peer.ID // of its own node
		}
	}
	switch field {
	case "id":
		return id, true
	case "name":
		return name, true
	case "namespace":
		return namespace, true
	}
	return nil, false
}

func (v *variables) token(field string) (any, bool) {
	if v.Token == nil {
		return nil, false
	}
	switch field {
	case "sub":
		return v.Token.Subject, true
	case "iss":
		return v.Token.Issuer, true
	case "client_id":
		return v.Token.ClientID, true
	case "scopes":
		return v.Token.Scopes, true
	case "groups":
		return v.Token.Groups, true
	case "claims":
		return v.Token.Raw, true
	}
	return nil, false
}

func (v *variables) params() map[string]string {
	if v.Match == nil || v.values != nil {
		return v.values
	}
	v.values = make(map[string]string, v.Match.Params())
	for i := range v.Match.Params() {
		name, value := v.Match.ParamAt(i)
		v.values[name] = value
	}
	return v.values
}

// conditionVariables are the names that a condition knows.
var conditionVariables = map[string]*cel.Type{
	"request.method":         cel.StringType,
	"request.path":           cel.StringType,
	"request.host":           cel.StringType,
	"request.content_length": cel.IntType,
	"request.headers":        cel.MapType(cel.StringType, cel.StringType),
	"source.id":              cel.StringType,
	"source.name":            cel.StringType,
	"source.namespace":       cel.StringType,
	"token.sub":              cel.StringType,
	"token.iss":              cel.StringType,
	"token.client_id":        cel.StringType,
	"token.scopes":           cel.ListType(cel.StringType),
	"token.groups":           cel.ListType(cel.StringType),
	"token.claims":           cel.MapType(cel.StringType, cel.DynType),
	"params":                 cel.MapType(cel.StringType, cel.StringType),
	"time":                   cel.TimestampType,
}

var conditionEnv = sync.OnceValues(func() (*cel.Env, error) {
	opts := []cel.EnvOption{
		cel.ParserExpressionSizeLimit(maxConditionChars),
		cel.ExpressionNodeLimit(maxConditionNodes),
		cel.ParserRecursionLimit(maxConditionDepth),
		cel.DefaultUTCTimeZone(true),
	}
	for name, t := range conditionVariables {
		opts = append(opts, cel.Variable(name, t))
	}
	return cel.NewEnv(opts...)
})

// exprError is an error at a place in an expression: a line counted from 1,
// 0 if unknown, and a column counted from 0.
type exprError struct {
	line, column int
	message      string
	hint         load.Hint // which the message has already
}

// compileCondition compiles an expression.
func compileCondition(text string) (*Condition, []exprError) {
	fault := func(format string, args ...any) (*Condition, []exprError) {
		return nil, []exprError{{message: fmt.Sprintf(format, args...)}}
	}
	if n := len(text); n > maxConditionChars {
		return fault("a condition may have %d characters, this one has %d", maxConditionChars, n)
	}
	env, err := conditionEnv()
	if err != nil {
		return fault("%v", err)
	}
	checked, issues := env.Compile(text)
	if issues.Err() != nil {
		var errs []exprError
		for _, e := range issues.Errors() {
			errs = append(errs, celError(text, e.Location.Line(), e.Location.Column(), e.Message))
		}
		return nil, errs
	}
	if t := checked.OutputType(); !t.IsExactType(cel.BoolType) && !t.IsExactType(cel.DynType) {
		return fault("is a %s, not a bool", t)
	}
	c := &Condition{Text: text, prices: prices{}}
	native := checked.NativeRep()
	if errs := c.inspect(native, ast.NavigateAST(native), nil); len(errs) > 0 {
		return nil, errs
	}
	estimate, err := env.EstimateCost(checked, nil)
	if c.least = evaluationCost; err == nil {
		c.least += estimate.Min
	}
	if err == nil && estimate.Min > maxConditionCost {
		return fault("costs at least %d, the limit is %d", estimate.Min, maxConditionCost)
	}
	c.program, err = env.Program(checked, cel.EvalOptions(cel.OptOptimize),
		cel.CostTracking(c.prices), cel.CostLimit(maxConditionCost))
	if err != nil {
		return fault("%v", err)
	}
	return c, nil
}

// inspect finds what an expression reads, and refuses headers that are not
// named by a literal: they could not be held to come only once.
func (c *Condition) inspect(a *ast.AST, e ast.NavigableExpr, errs []exprError) []exprError {
	if e.Kind() == ast.CallKind && e.AsCall().FunctionName() == overloads.Matches {
		errs = append(errs, c.regex(a, e.AsCall())...)
	}
	if e.Kind() == ast.IdentKind {
		switch name := e.AsIdent(); {
		case strings.HasPrefix(name, "token."):
			c.usesToken = true
		case name == "request.headers":
			if h, ok := constantKey(e); ok {
				c.headers = appendNew(c.headers, h)
			} else {
				errs = append(errs, at(a, e, "request.headers: name the header by a literal, as in request.headers['X-Account']"))
			}
		case name == "params":
			if p, ok := constantKey(e); ok {
				c.params = appendNew(c.params, p)
			} else {
				errs = append(errs, at(a, e, "params: name the parameter by a literal, as in params.id"))
			}
		}
	}
	for _, child := range e.Children() {
		errs = c.inspect(a, child, errs)
	}
	return errs
}

// constantKey returns the key by which the map e is read: m.key, m['key'],
// 'key' in m.
func constantKey(e ast.NavigableExpr) (string, bool) {
	parent, ok := e.Parent()
	if !ok {
		return "", false
	}
	switch parent.Kind() {
	case ast.SelectKind:
		return parent.AsSelect().FieldName(), true
	case ast.CallKind:
		call := parent.AsCall()
		args := call.Args()
		if len(args) != 2 {
			return "", false
		}
		key := args[1]
		switch call.FunctionName() {
		case operators.Index:
		case operators.In:
			key = args[0]
		default:
			return "", false
		}
		if key.Kind() == ast.LiteralKind {
			s, ok := key.AsLiteral().(types.String)
			return string(s), ok
		}
	}
	return "", false
}

func at(a *ast.AST, e ast.Expr, message string) exprError {
	loc := a.SourceInfo().GetStartLocation(e.ID())
	return exprError{line: loc.Line(), column: loc.Column(), message: message}
}

func appendNew(list []string, s string) []string {
	if slices.Contains(list, s) {
		return list
	}
	return append(list, s)
}

// celError puts into our words what CEL says.
func celError(text string, line, column int, message string) exprError {
	message = strings.ReplaceAll(message, " (in container '')", "")
	message = strings.ReplaceAll(message, "Syntax error: ", "")
	if i := strings.Index(message, " expecting "); i >= 0 {
		message = message[:i] // a list of all tokens
	}
	rest, ok := strings.CutPrefix(message, "undeclared reference to '")
	if !ok {
		return exprError{line: line, column: column, message: strings.Join(strings.Fields(message), " ")}
	}
	// CEL points at the last dot of a qualified name.
	name, _, _ := strings.Cut(rest, "'")
	if i := strings.LastIndexByte(name, '.'); i >= 0 && endsAt(text, line, column, name[:i]) {
		column -= len(name[:i])
	}
	text, hint := undeclared(name)
	return exprError{line, column, text, hint}
}

// undeclared says what is wrong with a name that CEL does not know.
func undeclared(name string) (string, load.Hint) {
	first, field, _ := strings.Cut(name, ".")
	var fields, firsts []string
	for v := range conditionVariables {
		vFirst, vField, _ := strings.Cut(v, ".")
		firsts = append(firsts, vFirst)
		if vFirst == first && vField != "" {
			fields = append(fields, vField)
		}
	}
	slices.Sort(fields)
	switch {
	case len(fields) == 0:
		hint := load.DidYouMean(first, firsts, "'")
		return fmt.Sprintf("undeclared reference to '%s'%s", first, hint), hint
	case field == "":
		return fmt.Sprintf("'%s' has to be followed by one of .%s", name, strings.Join(fields, ", .")), load.Hint{}
	}
	field, _, _ = strings.Cut(field, ".")
	hint := load.DidYouMean(field, fields, "'")
	return fmt.Sprintf("'%s' has no field '%s'%s; it has %s", first, field, hint, strings.Join(fields, ", ")), hint
}

// endsAt says whether s stands before that place.
func endsAt(text string, line, column int, s string) bool {
	lines := strings.Split(text, "\n")
	if line < 1 || line > len(lines) {
		return false
	}
	runes := []rune(lines[line-1])
	return column <= len(runes) && strings.HasSuffix(string(runes[:column]), s)
}
