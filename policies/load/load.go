// SPDX-License-Identifier: Apache-2.0

package load

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"

	"github.com/sallyport-dev/sallyport/policies/schema"
	"github.com/sallyport-dev/sallyport/policies/v1alpha1"
)

// Bounds of a set of files.
const (
	MaxFileBytes = 1 << 20
	MaxSetBytes  = 16 << 20
	MaxFiles     = 10_000
	MaxDocuments = 25_000
	MaxTuples    = 100_000
)

// Set is what a set of files holds, in order of file and place.
type Set struct {
	// Digest is the SHA-256 of names and contents, in hex.
	Digest     string
	Identities []*Doc[v1alpha1.MachineIdentity]
	Issuers    []*Doc[v1alpha1.TokenIssuer]
	Models     []*Doc[v1alpha1.RelationModel]
	Postures   []*Doc[v1alpha1.PostureProfile]
	Policies   []*Doc[v1alpha1.APIPolicy]
	Tuples     []*Doc[v1alpha1.TupleFile]
	// Failed says that there were errors: the set is for nothing but finding
	// more of them.
	Failed bool
	// Incomplete says that a document could not be read at all, so that a
	// reference to it is not what is wrong.
	Incomplete bool
	// Texts are the other files, by path: models that documents refer to.
	Texts map[string]string
}

// Documents returns the set's documents of all kinds.
func (s *Set) Documents() []*Document {
	var out []*Document
	out = documentsOf(out, s.Identities)
	out = documentsOf(out, s.Issuers)
	out = documentsOf(out, s.Models)
	out = documentsOf(out, s.Postures)
	return documentsOf(out, s.Policies)
}

func documentsOf[T any](out []*Document, docs []*Doc[T]) []*Document {
	for _, d := range docs {
		out = append(out, &d.Document)
	}
	return out
}

// Load reads a set of files and returns what it could make of it, with
// everything that is wrong with it.
//
// By its name a file is relation tuples (*.tuples.yaml), the text of a model
// (*.fga, *.fga.json), a test that is left out (*_test.yaml), or else
// policy documents.
func Load(files []File) (*Set, []Problem) {
	l := &loader{set: &Set{Texts: make(map[string]string)}, seen: make(map[string]Position)}
	files = slices.SortedStableFunc(slices.Values(files), func(a, b File) int { return cmp.Compare(a.Path, b.Path) })
	l.set.Digest = Digest(files)
	l.files(files)
	l.set.Failed = l.report.Failed()
	return l.set, l.report.Problems()
}

func (l *loader) files(files []File) {
	total := 0
	for i, f := range files {
		total += len(f.Content)
		switch {
		case i >= MaxFiles:
			l.report.Errorf(Position{File: f.Path}, "the set has more than %d files", MaxFiles)
			return
		case total > MaxSetBytes:
			l.report.Errorf(Position{File: f.Path}, "the set is larger than %d MiB", MaxSetBytes>>20)
			return
		case i > 0 && files[i-1].Path == f.Path:
			l.report.Errorf(Position{File: f.Path}, "the file is there twice")
			continue
		}
		l.file(f)
	}
}

// Digest is the SHA-256 of the files' names and contents, in hex, whatever
// their order.
func Digest(files []File) string {
	files = slices.SortedStableFunc(slices.Values(files), func(a, b File) int { return cmp.Compare(a.Path, b.Path) })
	h := sha256.New()
	var n [8]byte
	for _, f := range files {
		for _, part := range [][]byte{[]byte(f.Path), f.Content} {
			binary.LittleEndian.PutUint64(n[:], uint64(len(part)))
			h.Write(n[:])
			h.Write(part)
		}
	}
	return hex.EncodeToString(h.Sum(nil))
}

type kindOfFile int

const (
	documentsFile kindOfFile = iota
	tuplesFile
	textFile
	testFile
)

func fileKind(path string) kindOfFile {
	base := filepath.Base(path)
	if strings.HasSuffix(base, ".fga") || strings.HasSuffix(base, ".fga.json") {
		return textFile
	}
	for _, ext := range [...]string{".yaml", ".yml"} {
		if stem, ok := strings.CutSuffix(base, ext); ok {
			switch {
			case strings.HasSuffix(stem, "_test"):
				return testFile
			case strings.HasSuffix(stem, ".tuples"):
				return tuplesFile
			}
		}
	}
	return documentsFile
}

type loader struct {
	set       *Set
	report    Report
	seen      map[string]Position // KIND NAMESPACE/NAME
	documents int
	tuples    int
}

func (l *loader) file(f File) {
	kind := fileKind(f.Path)
	if kind == testFile || !l.readable(f, kind) {
		return
	}
	if kind == textFile {
		l.set.Texts[f.Path] = string(f.Content)
		return
	}
	for _, part := range split(f) {
		if l.documents++; l.documents > MaxDocuments {
			l.report.Errorf(Position{File: part.file, Line: part.skip + 1, Column: 1}, "the set has more than %d documents", MaxDocuments)
			return
		}
		for _, root := range l.parse(part) {
			if kind == tuplesFile {
				l.tupleFile(part, root)
			} else {
				l.document(part, root)
			}
		}
	}
}

// readable says whether a file is text of a bearable size.
func (l *loader) readable(f File, kind kindOfFile) bool {
	start := Position{File: f.Path}
	switch {
	case len(f.Content) > MaxFileBytes:
		l.report.Errorf(start, "the file is larger than %d MiB", MaxFileBytes>>20)
		return false
	case !utf8.Valid(f.Content):
		l.report.Errorf(start, "the file is not UTF-8")
		return false
	case bytes.IndexByte(f.Content, 0) >= 0:
		l.report.Errorf(start, "the file holds a NUL character")
		return false
	}
	if line := oddBreak(f.Content); line > 0 && kind != textFile {
		l.report.Errorf(Position{File: f.Path, Line: line, Column: 1}, "the line holds a line break that editors do not show as one (CR, NEL, LS or PS)")
		l.set.Incomplete = true
		return false
	}
	return true
}

// Documents decodes the documents of a file that is none of a policy set, as
// strictly as those. T says what its fields are by the tags of v1alpha1; what
// names a document in an error.
func Documents[T any](f File, what string) ([]*Doc[T], []Problem) {
	l := &loader{set: &Set{}}
	if !l.readable(f, documentsFile) {
		return nil, l.report.Problems()
	}
	var docs []*Doc[T]
	for _, part := range split(f) {
		d := &decoder{&part.source, &l.report}
		for _, root := range l.parse(part) {
			doc := &Doc[T]{Document: Document{Kind: what, root: root, source: d.source}}
			d.mapping(root, reflect.ValueOf(&doc.Value).Elem(), nil, what)
			docs = append(docs, doc)
		}
	}
	return docs, l.report.Problems()
}

// oddBreak returns the first line in which YAML sees a line break that is
// neither LF nor CRLF, 0 without one. Such a line is two for YAML and one for
// who reads it: places would be wrong, and comments could hide fields.
func oddBreak(content []byte) int {
	for i, c := range content {
		odd := false
		switch c {
		case '\r':
			odd = i+1 == len(content) || content[i+1] != '\n'
		case 0xc2:
			odd = bytes.HasPrefix(content[i:], []byte("\u0085"))
		case 0xe2:
			odd = bytes.HasPrefix(content[i:], []byte("\u2028")) || bytes.HasPrefix(content[i:], []byte("\u2029"))
		}
		if odd {
			return bytes.Count(content[:i], []byte("\n")) + 1
		}
	}
	return 0
}

// part is the text of a file from one document marker to the next.
type part struct {
	source
	body []byte
}

// split cuts a file at its document markers, so that a syntax error in one
// document does not hide the others.
func split(f File) []*part {
	var parts []*part
	text := &lines{content: f.Content}
	cut := func(from, to, skip int) {
		parts = append(parts, &part{source{f.Path, text, skip}, f.Content[from:to]})
	}
	start, skip, line := 0, 0, 0
	for at := 0; at < len(f.Content); line++ {
		end := len(f.Content)
		if i := bytes.IndexByte(f.Content[at:], '\n'); i >= 0 {
			end = at + i + 1
		}
		if at > start && isMarker(f.Content[at:end]) {
			cut(start, at, skip)
			start, skip = at, line
		}
		at = end
	}
	cut(start, len(f.Content), skip)
	return parts
}

func isMarker(line []byte) bool {
	rest, ok := bytes.CutPrefix(line, []byte("---"))
	return ok && (len(rest) == 0 || bytes.IndexByte([]byte(" \t\r\n"), rest[0]) >= 0)
}

var (
	yamlError   = regexp.MustCompile(`^yaml: (?:line (\d+): )?(?s:(.*))$`)
	parserError = regexp.MustCompile(`^did not find expected (<|node content|key|'-' indicator|',' or)`)
)

// parse returns the root nodes of a part's documents, none where they do
// not parse.
func (l *loader) parse(p *part) (roots []*yaml.Node) {
	defer func() {
		if x := recover(); x != nil {
			l.report.Errorf(Position{File: p.file, Line: p.skip + 1, Column: 1}, "the document cannot be read: %v", x)
			roots, l.set.Incomplete = nil, true
		}
	}()
	dec := yaml.NewDecoder(bytes.NewReader(p.body))
	for {
		var doc yaml.Node
		if err := dec.Decode(&doc); err != nil {
			if !errors.Is(err, io.EOF) {
				l.set.Incomplete = true
				l.syntax(p, err)
			}
			return roots
		}
		if doc.Kind != yaml.DocumentNode || len(doc.Content) != 1 {
			continue
		}
		root := doc.Content[0]
		if root.Kind == yaml.ScalarNode && root.Tag == "!!null" {
			continue // nothing but comments
		}
		d := &decoder{&p.source, &l.report}
		if d.inspect(root, 0) {
			roots = append(roots, root)
		} else {
			l.set.Incomplete = true
		}
	}
}

func (l *loader) syntax(p *part, err error) {
	pos := Position{File: p.file, Line: p.skip + 1, Column: 1}
	message := err.Error()
	if m := yamlError.FindStringSubmatch(message); m != nil {
		message = m[2]
		if n, err := strconv.Atoi(m[1]); err == nil {
			if parserError.MatchString(message) {
				n++ // the library counts these from 0
			}
			pos.Line = min(p.skip+n, p.text.count())
		}
	}
	line := p.line(pos.Line)
	pos.Column = utf8.RuneCountInString(line) - utf8.RuneCountInString(strings.TrimLeft(line, " \t")) + 1
	l.report.Errorf(pos, "YAML: %s", strings.ToValidUTF8(message, "?"))
}

// document decodes one policy document.
func (l *loader) document(p *part, root *yaml.Node) {
	d := &decoder{&p.source, &l.report}
	if root.Kind != yaml.MappingNode {
		d.errorf(root, "want a document with apiVersion, kind, metadata and spec, got %s", describe(root))
		return
	}
	if !l.apiVersion(d, root) {
		l.set.Incomplete = true
		return
	}
	key, kind := child(root, "kind")
	switch {
	case kind == nil:
		d.errorf(root, "kind is missing")
	case kind.Value == v1alpha1.KindMachineIdentity:
		decodeDocument(l, d, root, kind.Value, &l.set.Identities, func(v *v1alpha1.MachineIdentity) v1alpha1.Metadata { return v.Metadata })
	case kind.Value == v1alpha1.KindTokenIssuer:
		decodeDocument(l, d, root, kind.Value, &l.set.Issuers, func(v *v1alpha1.TokenIssuer) v1alpha1.Metadata { return v.Metadata })
	case kind.Value == v1alpha1.KindRelationModel:
		decodeDocument(l, d, root, kind.Value, &l.set.Models, func(v *v1alpha1.RelationModel) v1alpha1.Metadata { return v.Metadata })
	case kind.Value == v1alpha1.KindPostureProfile:
		decodeDocument(l, d, root, kind.Value, &l.set.Postures, func(v *v1alpha1.PostureProfile) v1alpha1.Metadata { return v.Metadata })
	case kind.Value == v1alpha1.KindAPIPolicy:
		decodeDocument(l, d, root, kind.Value, &l.set.Policies, func(v *v1alpha1.APIPolicy) v1alpha1.Metadata { return v.Metadata })
	case kind.Kind != yaml.ScalarNode:
		d.errorf(key, "kind: want a text, got %s", describe(kind))
	default:
		d.errorf(kind, "kind: %q is not one of %s%s", shown(kind.Value), strings.Join(schema.Kinds(), ", "), l.report.Suggest(kind.Value, schema.Kinds()))
	}
}

func (l *loader) apiVersion(d *decoder, root *yaml.Node) bool {
	_, v := child(root, "apiVersion")
	switch {
	case v == nil:
		d.errorf(root, "apiVersion is missing; it is %s", v1alpha1.APIVersion)
		return false
	case v.Value != v1alpha1.APIVersion || v.Kind != yaml.ScalarNode:
		d.errorf(v, "apiVersion: %s is not %s", describe(v), v1alpha1.APIVersion)
		return false
	}
	return true
}

var (
	nameForm      = regexp.MustCompile(schema.NamePattern)
	namespaceForm = regexp.MustCompile(schema.NamespacePattern)
)

func decodeDocument[T any](l *loader, d *decoder, root *yaml.Node, kind string, into *[]*Doc[T], meta func(*T) v1alpha1.Metadata) {
	doc := &Doc[T]{Document: Document{Kind: kind, root: root, source: d.source}}
	d.mapping(root, reflect.ValueOf(&doc.Value).Elem(), nil, kind, "apiVersion", "kind")
	m := meta(&doc.Value)
	doc.Name, doc.Namespace = m.Name, cmp.Or(m.Namespace, v1alpha1.DefaultNamespace)
	if m.Name == "" {
		l.set.Incomplete = true
		if _, n := child(root, "metadata"); n != nil {
			if k, v := child(n, "name"); v != nil && v.Value == "" && v.Tag == "!!str" {
				d.errorf(k, "name is empty")
			}
		}
		return // missing, and reported
	}
	if !nameForm.MatchString(doc.Name) {
		l.report.Errorf(doc.At("metadata", "name"), "name: %q is not a name: at most 63 lower-case letters, digits, - and . with a letter or digit at both ends", shown(doc.Name))
		return
	}
	if !namespaceForm.MatchString(doc.Namespace) {
		l.report.Errorf(doc.At("metadata", "namespace"), "namespace: %q is not a name: at most 63 lower-case letters, digits and - with a letter or digit at both ends", shown(doc.Namespace))
		return
	}
	key := fmt.Sprintf("%s %s", kind, doc.FullName())
	if first, ok := l.seen[key]; ok {
		l.report.Errorf(doc.At("metadata", "name"), "%s %s is there twice: first at %s", kind, doc.FullName(), first)
		return
	}
	l.seen[key] = doc.At("metadata", "name")
	*into = append(*into, doc)
}

// tupleFile decodes a list of tuples, or a model and a list.
func (l *loader) tupleFile(p *part, root *yaml.Node) {
	d := &decoder{&p.source, &l.report}
	doc := &Doc[v1alpha1.TupleFile]{Document: Document{Kind: "tuples", root: root, source: d.source}}
	v := reflect.ValueOf(&doc.Value).Elem()
	if root.Kind == yaml.SequenceNode {
		tuples := &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: "tuples", Line: root.Line, Column: root.Column}
		doc.root = &yaml.Node{
			Kind: yaml.MappingNode, Tag: "!!map", Content: []*yaml.Node{tuples, root}, Line: root.Line, Column: root.Column,
		}
	}
	d.mapping(doc.root, v, nil, "tuples")
	if l.tuples += len(doc.Value.Tuples); l.tuples > MaxTuples {
		l.report.Errorf(doc.Position(), "the set has more than %d tuples", MaxTuples)
		return
	}
	l.set.Tuples = append(l.set.Tuples, doc)
}
