// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"cmp"
	"slices"
	"strings"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// Matches is what Match found. It is the caller's, reused from call to call:
// then no call allocates, but for paths with percent-encodings.
type Matches struct {
	// Rules are the matching deny rules, then the matching allow rules, each
	// in document order. Token, relation and condition are yet to be asked.
	Rules []Match
	// Refusal, if not ReasonOK, refuses whatever the rules and otherwise
	// say, unless a deny rule refuses first: ReasonMayCall, or ReasonTarget
	// and ReasonTooLarge for what cannot be matched unambiguously. Rules
	// then holds no allow rule.
	Refusal flow.Reason

	walk walker
}

// Match is one rule that matched, with the values of its path's parameters.
type Match struct {
	Rule *Rule
	// Template is the path template that matched, "" where the rule speaks
	// of no path.
	Template string

	pattern *pattern
	path    string // what the spans are in
	encoded bool   // path holds percent-encodings that are still to be decoded
	spans   [maxParams]span
}

type span struct{ start, end uint16 }

// Param returns the value of a parameter, decoded. It allocates only for
// values with percent-encodings.
func (m *Match) Param(name string) (string, bool) {
	if m.pattern == nil {
		return "", false
	}
	for i, n := range m.pattern.params {
		if n == name {
			v := m.path[m.spans[i].start:m.spans[i].end]
			if m.encoded {
				v = decodeAll(v)
			}
			return v, true
		}
	}
	return "", false
}

// Params returns how many parameters the matching template has.
func (m *Match) Params() int {
	if m.pattern == nil {
		return 0
	}
	return len(m.pattern.params)
}

// ParamAt returns the name and the decoded value of the parameter i.
func (m *Match) ParamAt(i int) (name, value string) {
	name = m.pattern.params[i]
	value, _ = m.Param(name)
	return name, value
}

// table holds the allow or the deny rules of an API.
type table struct {
	any    tree
	byHost map[string]*tree
	// Deny rules that a connection without a request cannot be held
	// against, and that therefore deny it: those that name paths, and those
	// that name hosts but no path.
	opaqueHTTP, opaqueHosts leaf
}

// tree holds the rules for one host.
type tree struct {
	always leaf // those that name no path
	root   node // beneath the first slash
}

type node struct {
	static map[string]*node
	param  *node
	end    methods // patterns that end here
	rest   methods // patterns that end in /** beneath this node
}

type methods struct {
	any leaf
	by  map[string]*leaf
}

type leaf struct {
	any []entry
	by  map[*Identity][]entry
}

type entry struct {
	rule    *Rule
	pattern *pattern
}

func (l *leaf) add(e entry, from []*Identity) {
	if len(from) == 0 {
		l.any = append(l.any, e)
		return
	}
	if l.by == nil {
		l.by = make(map[*Identity][]entry, len(from))
	}
	for _, f := range from {
		l.by[f] = append(l.by[f], e)
	}
}

func (m *methods) leaf(method string) *leaf {
	if method == "" {
		return &m.any
	}
	l := m.by[method]
	if l == nil {
		if m.by == nil {
			m.by = make(map[string]*leaf)
		}
		l = new(leaf)
		m.by[method] = l
	}
	return l
}

func (t *table) tree(host string) *tree {
	if host == "" {
		return &t.any
	}
	tr := t.byHost[host]
	if tr == nil {
		if t.byHost == nil {
			t.byHost = make(map[string]*tree)
		}
		tr = new(tree)
		t.byHost[host] = tr
	}
	return tr
}

// add enters a rule. Deny rules match more than they say where applications
// differ: their literals are compared decoded, methods without regard to
// case, and a slash at the end is not seen.
func (t *table) add(r *Rule, from []*Identity, hosts []string, patterns []*pattern) {
	if len(hosts) == 0 {
		hosts = anyHost
	}
	for _, h := range hosts {
		tr := t.tree(h)
		if len(patterns) == 0 {
			tr.always.add(entry{rule: r}, from)
		}
		for _, p := range patterns {
			tr.root.insert(p, r.Deny).add(entry{r, p}, from)
		}
	}
	if r.Deny && len(patterns) > 0 {
		t.opaqueHTTP.add(entry{rule: r}, from)
	} else if r.Deny && hosts[0] != "" {
		t.opaqueHosts.add(entry{rule: r}, from)
	}
}

var anyHost = []string{""}

func (n *node) insert(p *pattern, deny bool) *leaf {
	segments, method, rest := p.segments, p.method, p.rest
	switch {
	case p.grpc && !deny:
		method = methodGRPC
	case deny && p.grpc:
		// Servers also take calls of it by other methods than gRPC's own.
		if method = ""; segments[1].param {
			segments, rest = segments[:1], true
		}
	case deny:
		method = strings.ToUpper(method)
		if l := len(segments); l > 1 && !p.rest && segments[l-1] == (segment{}) {
			segments = segments[:l-1]
		}
	}
	for _, s := range segments {
		if s.param {
			if n.param == nil {
				n.param = new(node)
			}
			n = n.param
			continue
		}
		literal := decodeUnreserved(s.literal)
		if deny {
			literal = decodeAll(s.literal)
		}
		next := n.static[literal]
		if next == nil {
			if n.static == nil {
				n.static = make(map[string]*node)
			}
			next = new(node)
			n.static[literal] = next
		}
		n = next
	}
	if rest {
		return n.rest.leaf(method)
	}
	return n.end.leaf(method)
}

// Call is what is asked for: Host in lower case without port, Path without
// query. An empty Method is an opaque connection, whose Host is the SNI or "".
type Call struct {
	Host, Method, Path string
	GRPC               bool // it is a call of gRPC, over HTTP/2
	Upgrade            bool // it asks to switch to WebSocket; rules that do not allow that speak of it all the same
}

// methodGRPC stands in the trees for the POST of a call of gRPC. No request's
// method is spelt like it.
const methodGRPC = "POST gRPC"

// Match fills m with the rules that speak of such a call; src is the caller's
// identity, nil if none was proven.
//
// Paths are compared exactly, by case too, after what RFC 3986 section
// 6.2.2.2 calls equivalent (%61 is a). So that a deny rule cannot be evaded,
// it compares fully decoded literals, any case of a method and with or
// without a slash at the end; and one that names paths or hosts denies an
// opaque connection, which cannot be held against it.
func (a *API) Match(m *Matches, src *Identity, c Call) {
	m.Rules = m.Rules[:0]
	m.Refusal = flow.ReasonOK
	host, method, path := strings.ToLower(strings.TrimSuffix(c.Host, ".")), c.Method, c.Path
	w := &m.walk
	*w = walker{out: m.Rules, src: src, method: method}
	if method == "" {
		a.deny.opaque(w, host)
	} else if m.Refusal = a.readable(host, path); m.Refusal == flow.ReasonOK {
		a.deny.request(w, host, denyPath(path), false)
	} else {
		// Which deny rule would have matched cannot be told; the refusal is
		// certain either way.
		a.deny.any.always.visit(w)
	}
	if src != nil && m.Refusal == flow.ReasonOK && !src.MayCallIdentity(a.Identity) {
		m.Refusal = flow.ReasonMayCall
	}
	if m.Refusal == flow.ReasonOK {
		w.method, w.grpc = method, c.GRPC
		if method == "" {
			a.allow.hosted(w, host)
		} else {
			a.allow.request(w, host, decodeUnreserved(path), true)
		}
	}
	m.Rules = w.out
	*w = walker{}
	m.order()
}

// readable refuses a request that rules could not be held against.
func (a *API) readable(host, path string) flow.Reason {
	if path != "*" {
		if r := checkPath(path); r != flow.ReasonOK {
			return r
		}
	}
	if host == "" && len(a.deny.byHost) > 0 {
		return flow.ReasonTarget
	}
	return flow.ReasonOK
}

func denyPath(path string) string {
	path = decodeAll(path)
	if len(path) > 1 {
		path = strings.TrimSuffix(path, "/")
	}
	return path
}

// order sorts by the rules' order and keeps the first match of each: the
// most specific one.
func (m *Matches) order() {
	sorted := true
	for i := 1; i < len(m.Rules) && sorted; i++ {
		sorted = m.Rules[i-1].Rule.order < m.Rules[i].Rule.order
	}
	if sorted {
		return
	}
	slices.SortStableFunc(m.Rules, func(a, b Match) int { return cmp.Compare(a.Rule.order, b.Rule.order) })
	m.Rules = slices.CompactFunc(m.Rules, func(a, b Match) bool { return a.Rule == b.Rule })
}

func (t *table) opaque(w *walker, host string) {
	t.hosted(w, host)
	t.opaqueHTTP.visit(w)
	if host == "" {
		t.opaqueHosts.visit(w)
	}
}

func (t *table) hosted(w *walker, host string) {
	if tr := t.byHost[host]; tr != nil {
		tr.always.visit(w)
	}
	t.any.always.visit(w)
}

func (t *table) request(w *walker, host, path string, encoded bool) {
	w.path, w.encoded = path, encoded && strings.IndexByte(path, '%') >= 0
	if !encoded {
		w.method = strings.ToUpper(w.method)
	}
	if tr := t.byHost[host]; tr != nil {
		tr.request(w)
	}
	t.any.request(w)
}

func (t *tree) request(w *walker) {
	t.always.visit(w)
	if w.path == "*" { // of OPTIONS: the server as a whole
		t.root.rest.visit(w)
		return
	}
	w.node(&t.root, 1, 0)
}

// walker carries one look-up through the trees.
type walker struct {
	out     []Match
	src     *Identity
	method  string
	grpc    bool
	path    string
	encoded bool
	spans   [maxParams]span
}

// node visits what matches the path from at on, the start of a segment; the
// most specific first: literals, parameters, the rest.
func (w *walker) node(n *node, at, params int) {
	if at > len(w.path) {
		n.end.visit(w)
		n.rest.visit(w)
		return
	}
	end := len(w.path)
	if i := strings.IndexByte(w.path[at:], '/'); i >= 0 {
		end = at + i
	}
	if next := n.static[w.path[at:end]]; next != nil {
		w.node(next, end+1, params)
	}
	if n.param != nil && end > at {
		w.spans[params] = span{uint16(at), uint16(end)}
		w.node(n.param, end+1, params+1)
	}
	n.rest.visit(w)
}

func (m *methods) visit(w *walker) {
	if w.grpc {
		if l := m.by[methodGRPC]; l != nil {
			l.visit(w)
		}
	}
	if l := m.by[w.method]; l != nil {
		l.visit(w)
	}
	m.any.visit(w)
}

func (l *leaf) visit(w *walker) {
	w.emit(l.any)
	if w.src != nil && l.by != nil {
		w.emit(l.by[w.src])
	}
}

func (w *walker) emit(entries []entry) {
	for i := range entries {
		m := Match{Rule: entries[i].rule, pattern: entries[i].pattern, path: w.path, encoded: w.encoded}
		if m.pattern != nil {
			m.Template = m.pattern.template
			m.spans = w.spans
		}
		w.out = append(w.out, m)
	}
}
