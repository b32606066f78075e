// SPDX-License-Identifier: Apache-2.0

// Package http1 reads HTTP/1.1 messages (RFC 9112) strictly and without
// allocation. It never rewrites what it accepts: the fields it returns alias
// the caller's buffer, and the bytes that were judged are the bytes that go
// on, less the fields that end at an intermediary (RFC 9110, 7.6.1) and those
// that name an identity, which only the proxy may write.
//
// What two parsers could read differently is refused, in both directions.
// Every refusal is an *Error that carries its flow.Reason.
package http1

import (
	"bytes"
	"encoding/binary"
	"slices"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// Limits of a message. A message beyond one is refused with
// flow.ReasonTooLarge.
const (
	MaxHead      = 64 << 10 // bytes of a head, the empty line included
	MaxTarget    = 8 << 10  // bytes of a request target
	MaxFields    = 128      // field lines of a head
	MaxAdded     = 8        // those that Compact may add to them
	MaxMethod    = 32       // bytes of a method
	MaxHost      = 255      // bytes of a host name
	MaxExtension = 256      // bytes of the extensions of one chunk
	MaxTrailer   = 8 << 10  // bytes of a trailer section
	maxStartLine = MaxTarget + MaxMethod + len("  HTTP/1.1\r\n")
	// maxOverhead is how many bytes of chunk framing may exceed the content,
	// beside chunkAllowance for each chunk, which is what a plain one has.
	maxOverhead    = 16 << 10
	chunkAllowance = 16
)

// Error says why a message is refused. The text names the rule, never what
// was received.
type Error struct {
	Reason flow.Reason
	Text   string
}

// Error returns the text.
func (e *Error) Error() string { return e.Text }

func malformed(text string) *Error { return &Error{flow.ReasonMalformed, text} }
func tooLarge(text string) *Error  { return &Error{flow.ReasonTooLarge, text} }
func badTarget(text string) *Error { return &Error{flow.ReasonTarget, text} }

var (
	errBareLF        = malformed("a line ends without CR")
	errEmptyLine     = malformed("an empty line before the start line")
	errStartLineLong = tooLarge("the start line is too long")
	errHeadLong      = tooLarge("the head is too long")
	errFields        = tooLarge("too many fields")
	errFold          = malformed("a folded field line")
	errName          = malformed("a field name that is not a token")
	errColon         = malformed("a field line without colon")
	errValue         = malformed("a control character in a field value")
	errLengthTwice   = malformed("Content-Length came more than once")
	errLength        = malformed("Content-Length is not a plain number")
	errCodingTwice   = malformed("Transfer-Encoding came more than once")
	errCoding        = malformed("a transfer coding other than chunked")
	errBoth          = malformed("Content-Length with Transfer-Encoding")
	errOldCoding     = malformed("Transfer-Encoding in HTTP/1.0")
	errConnection    = malformed("Connection holds what is no token")
	errNominated     = &Error{flow.ReasonHeaderAmbiguous, "Connection names an end-to-end field"}
	errUnderscore    = &Error{flow.ReasonHeaderAmbiguous, "two field names that differ in an underscore alone"}
	errVersion       = malformed("the version is neither HTTP/1.1 nor HTTP/1.0")
)

// Byte classes.
const (
	classToken   = 1 << iota // RFC 9110, 5.6.2
	classPath                // pchar of RFC 3986 less ";", and "/"
	classQuery               // visible ASCII less "#"
	classHost                // what a host name or an address literal is made of
	classControl             // what no field value may hold
	classHex
)

var class = func() (t [256]uint8) {
	for c := range 256 {
		b := byte(c)
		alnum := '0' <= b && b <= '9' || 'a' <= b && b <= 'z' || 'A' <= b && b <= 'Z'
		if alnum || bytes.IndexByte([]byte("!#$%&'*+-.^_`|~"), b) >= 0 {
			t[c] |= classToken
		}
		if alnum || bytes.IndexByte([]byte("-._~%!$&'()*+,=:@/"), b) >= 0 {
			t[c] |= classPath
		}
		if 0x21 <= b && b <= 0x7e && b != '#' {
			t[c] |= classQuery
		}
		if alnum || b == '.' || b == '-' || b == '_' {
			t[c] |= classHost
		}
		if b < 0x20 && b != '\t' || b == 0x7f {
			t[c] |= classControl
		}
		if '0' <= b && b <= '9' || 'a' <= b && b <= 'f' || 'A' <= b && b <= 'F' {
			t[c] |= classHex
		}
	}
	return t
}()

// CheckValue refuses a field value with a control character other than HTAB.
func CheckValue(b []byte) error {
	if hasControl(b) {
		return errValue
	}
	return nil
}

// IsToken says whether b is a token (RFC 9110, 5.6.2).
func IsToken(b []byte) bool { return len(b) > 0 && all(b, classToken) }

func is(c byte, k uint8) bool { return class[c]&k != 0 }

func all(b []byte, k uint8) bool {
	for _, c := range b {
		if class[c]&k == 0 {
			return false
		}
	}
	return true
}

// hasControl says whether b holds a control character other than HTAB. It
// looks at eight bytes at a time.
func hasControl(b []byte) bool {
	const ones, highs = 0x0101010101010101, 0x8080808080808080
	for len(b) >= 8 {
		w := binary.LittleEndian.Uint64(b)
		below := (w - ones*0x20) &^ w & highs // some byte < 0x20; exact enough, the slow look decides
		d := w ^ ones*0x7f
		del := (d - ones) &^ d & highs
		if below|del != 0 {
			for _, c := range b[:8] {
				if class[c]&classControl != 0 {
					return true
				}
			}
		}
		b = b[8:]
	}
	for _, c := range b {
		if class[c]&classControl != 0 {
			return true
		}
	}
	return false
}

// fold compares without regard to ASCII case; s is lower case.
func fold(b []byte, s string) bool {
	if len(b) != len(s) {
		return false
	}
	for i, c := range b {
		if 'A' <= c && c <= 'Z' {
			c += 'a' - 'A'
		}
		if c != s[i] {
			return false
		}
	}
	return true
}

// foldDash is fold with an underscore read as a dash, as CGI-style servers
// read it.
func foldDash(b []byte, s string) bool {
	if len(b) != len(s) {
		return false
	}
	for i, c := range b {
		switch {
		case 'A' <= c && c <= 'Z':
			c += 'a' - 'A'
		case c == '_':
			c = '-'
		}
		if c != s[i] {
			return false
		}
	}
	return true
}

// Scan finds the end of a head in a buffer that grows from call to call. The
// zero Scan is ready.
type Scan struct {
	next  int // where the next look begins
	start int // of the line that is not yet complete
	lines int
}

// End returns the length of the head at the start of b, the empty line
// included, or 0 if it is not complete. b begins with what it held in the
// call before.
func (s *Scan) End(b []byte) (int, error) {
	for {
		i := bytes.IndexByte(b[s.next:], '\n')
		if i < 0 {
			s.next = len(b)
			if s.lines == 0 && len(b) > maxStartLine {
				return 0, errStartLineLong
			}
			if len(b) >= MaxHead {
				return 0, errHeadLong
			}
			return 0, nil
		}
		at := s.next + i
		switch {
		case at == 0 || b[at-1] != '\r':
			return 0, errBareLF
		case at >= MaxHead:
			return 0, errHeadLong
		case at-1 == s.start && s.lines == 0:
			return 0, errEmptyLine
		case at-1 == s.start:
			return at + 1, nil
		case s.lines == 0 && at >= maxStartLine:
			return 0, errStartLineLong
		}
		s.lines++
		if s.lines > MaxFields+1 {
			return 0, errFields
		}
		s.start, s.next = at+1, at+1
	}
}

// cut is a part of a head that does not go on.
type cut struct{ from, to int }

// Framing is what the two kinds of head have in common. Its slices alias the
// buffer that was parsed.
type Framing struct {
	Len    int   // bytes of the head, the empty line included
	Minor  uint8 // of the version HTTP/1.Minor
	Fields []flow.Header
	// ContentLength is in bytes, -1 when the body is chunked; 0 without
	// Content-Length, see HasLength.
	ContentLength int64
	HasLength     bool
	// Close says that the sender ends the connection after this message.
	Close bool

	cuts       []cut
	kept       cut      // the Connection line that goes on, if any
	hashes     []uint32 // storage for Body.guard
	connection bool     // a Connection field came
	keepAlive  bool
	coding     bool
	nominates  bool // Connection names something else than close and keep-alive
	upgrades   bool // and that is upgrade
	underscore bool
}

func (f *Framing) clear() {
	*f = Framing{Fields: f.Fields[:0], cuts: f.cuts[:0], hashes: f.hashes[:0]}
}

// field reads the line b[from:to), which lies without its CRLF in a head of at
// most most lines.
func (f *Framing) field(b []byte, from, to, most int, request bool) error {
	line := b[from:to]
	if line[0] == ' ' || line[0] == '\t' {
		return errFold
	}
	n := 0
	for n < len(line) && class[line[n]]&classToken != 0 {
		n++
	}
	if n == len(line) {
		return errColon
	}
	if n == 0 || line[n] != ':' {
		return errName
	}
	name, value := line[:n], line[n+1:]
	for len(value) > 0 && (value[0] == ' ' || value[0] == '\t') {
		value = value[1:]
	}
	for len(value) > 0 && (value[len(value)-1] == ' ' || value[len(value)-1] == '\t') {
		value = value[:len(value)-1]
	}
	if hasControl(value) {
		return errValue
	}
	if len(f.Fields) == most {
		return errFields
	}
	goesOn, err := f.known(name, value, line[n+1:], request)
	if err != nil {
		return err
	}
	if !goesOn {
		f.cuts = append(f.cuts, cut{from, to + 2})
	} else if fold(name, "connection") {
		f.kept = cut{from, to + 2}
	}
	f.Fields = append(f.Fields, flow.Header{Name: name, Value: value})
	return nil
}

// known reads the fields that frame the message and says whether the line
// goes on. raw is the value with its white space.
func (f *Framing) known(name, value, raw []byte, request bool) (goesOn bool, err error) {
	if !f.underscore && bytes.IndexByte(name, '_') >= 0 {
		f.underscore = true
	}
	switch len(name) {
	case len("te"):
		goesOn = !fold(name, "te")
	case len("upgrade"):
		goesOn = !fold(name, "upgrade")
	case len("connection"):
		if fold(name, "connection") {
			return f.connectionField(value)
		}
		goesOn = !fold(name, "keep-alive")
	case len("content-length"):
		if foldDash(name, "content-length") {
			return true, f.contentLength(name, value, raw)
		}
		goesOn = !fold(name, "http2-settings")
	case len("proxy-connection"):
		goesOn = !fold(name, "proxy-connection")
	case len("transfer-encoding"):
		goesOn = true
		if foldDash(name, "transfer-encoding") {
			return true, f.transferEncoding(name, value, raw)
		}
	default:
		goesOn = true
	}
	return goesOn && (!request || !IsIdentity(name)), nil
}

// IsIdentity says whether a field of that name tells an application who
// calls: only the proxy may write it.
func IsIdentity(name []byte) bool {
	const ours = "x-sallyport-"
	return len(name) >= len(ours) && foldDash(name[:len(ours)], ours) ||
		foldDash(name, "x-forwarded-client-cert")
}

func (f *Framing) contentLength(name, value, raw []byte) error {
	if f.HasLength {
		return errLengthTwice
	}
	n, err := Length(value)
	if err != nil || bytes.IndexByte(raw, '\t') >= 0 || bytes.IndexByte(name, '_') >= 0 {
		return errLength
	}
	f.ContentLength, f.HasLength = n, true
	return nil
}

// Length reads the value of Content-Length, in bytes.
func Length(value []byte) (int64, error) {
	if len(value) == 0 || len(value) > 18 || len(value) > 1 && value[0] == '0' {
		return 0, errLength
	}
	var n int64
	for _, c := range value {
		if c < '0' || c > '9' {
			return 0, errLength
		}
		n = n*10 + int64(c-'0')
	}
	return n, nil
}

func (f *Framing) transferEncoding(name, value, raw []byte) error {
	if f.coding {
		return errCodingTwice
	}
	if string(value) != "chunked" || bytes.IndexByte(raw, '\t') >= 0 || bytes.IndexByte(name, '_') >= 0 {
		return errCoding
	}
	f.coding = true
	return nil
}

// connectionField reads the options of one Connection field. A field that
// says nothing but close or keep-alive is what we would write ourselves, so
// it goes on.
func (f *Framing) connectionField(value []byte) (goesOn bool, err error) {
	first := !f.connection
	f.connection = true
	if len(value) == 0 {
		return false, nil
	}
	options := 0
	for rest := value; ; {
		option := rest
		i := bytes.IndexByte(rest, ',')
		if i >= 0 {
			option = rest[:i]
		}
		option = bytes.Trim(option, " \t")
		switch {
		case fold(option, "close"):
			f.Close = true
		case fold(option, "keep-alive"):
			f.keepAlive = true
		case len(option) == 0:
		case !all(option, classToken):
			return false, errConnection
		default:
			f.nominates = true
			f.upgrades = f.upgrades || fold(option, "upgrade")
		}
		options++
		if i < 0 {
			break
		}
		rest = rest[i+1:]
	}
	return first && options == 1 && !f.nominates, nil
}

// hopByHop are the fields that Connection may name (lower case): they do not
// go on, whether it names them or not.
var hopByHop = [...]string{"close", "keep-alive", "te", "upgrade", "http2-settings", "proxy-connection", "connection", "transfer-encoding", "trailer"}

// finish judges the fields together.
func (f *Framing) finish() error {
	if f.coding {
		if f.HasLength {
			return errBoth
		}
		if f.Minor == 0 {
			return errOldCoding
		}
		f.ContentLength = -1
	}
	if f.Minor == 0 && !f.keepAlive {
		f.Close = true
	}
	if f.nominates {
		if err := f.nominated(); err != nil {
			return err
		}
	}
	if f.underscore {
		return Underscores(f.Fields)
	}
	return nil
}

// nominated refuses a Connection option that names a field which is present
// and is not hop-by-hop: RFC 9110 has it removed, and a policy may have
// judged it.
func (f *Framing) nominated() error {
	for i := range f.Fields {
		if !fold(f.Fields[i].Name, "connection") {
			continue
		}
		for rest, more := f.Fields[i].Value, true; more; {
			var option []byte
			option, rest, more = bytes.Cut(rest, []byte(","))
			option = bytes.Trim(option, " \t")
			if !hop(option) && f.has(option) {
				return errNominated
			}
		}
	}
	return nil
}

func hop(option []byte) bool {
	for _, h := range hopByHop {
		if fold(option, h) {
			return true
		}
	}
	return false
}

func (f *Framing) has(name []byte) bool {
	for i := range f.Fields {
		if bytes.EqualFold(f.Fields[i].Name, name) {
			return true
		}
	}
	return false
}

// Underscores refuses X_Account beside X-Account: a CGI-style server takes
// them for one field.
func Underscores(fields []flow.Header) error {
	for i := range fields {
		name := fields[i].Name
		if bytes.IndexByte(name, '_') < 0 {
			continue
		}
		for j := range fields {
			if j != i && !bytes.EqualFold(fields[j].Name, name) && equalDash(fields[j].Name, name) {
				return errUnderscore
			}
		}
	}
	return nil
}

func equalDash(a, b []byte) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i]|0x20 != b[i]|0x20 && (!dash(a[i]) || !dash(b[i])) {
			return false
		}
	}
	return true
}

func dash(c byte) bool { return c == '-' || c == '_' }

// fieldLines reads the field section of head, which begins at from and ends
// with the empty line, of at most most lines.
func (f *Framing) fieldLines(head []byte, from, most int, request bool) error {
	for end := len(head) - 2; from < end; {
		to := from + bytes.IndexByte(head[from:], '\r')
		if head[to+1] != '\n' {
			return errValue
		}
		if err := f.field(head, from, to, most, request); err != nil {
			return err
		}
		from = to + 2
	}
	f.Len = len(head)
	return f.finish()
}

// DropConnection has Compact drop every Connection field, for who adds one.
func (f *Framing) DropConnection() {
	if f.kept.to == 0 {
		return
	}
	at := len(f.cuts)
	for at > 0 && f.cuts[at-1].from > f.kept.from {
		at--
	}
	f.cuts = append(f.cuts, cut{})
	copy(f.cuts[at+1:], f.cuts[at:])
	f.cuts[at] = f.kept
	f.kept = cut{}
}

// Compact drops what does not go on from a head that begins at full[at] and
// inserts add (whole field lines, each with its CRLF) before its empty line.
// The head still ends where it ended, so that the content behind it stays
// contiguous; Compact returns where it now begins. at must be at least
// len(add). The fields that were parsed are void afterwards.
func (f *Framing) Compact(full []byte, at int, add []byte) (begin int) {
	end := at + f.Len - 2
	to, stop := end, f.Len-2
	for _, c := range slices.Backward(f.cuts) {
		to -= copy(full[to-(stop-c.to):to], full[at+c.to:at+stop])
		stop = c.from
	}
	if to != at+stop {
		copy(full[to-stop:to], full[at:at+stop])
	}
	begin = to - stop
	if len(add) > 0 {
		copy(full[begin-len(add):], full[begin:end])
		copy(full[end-len(add):], add)
		begin -= len(add)
	}
	return begin
}
