package http1

import (
	"bytes"
	"encoding/binary"
	"net/http"
)

// A Field is one field line: views into the connection's buffer, the value
// without the blanks around it.
type Field struct {
	Name, Value []byte
	kind        kind
	plain       bool // its line is as it is written: Name is followed by ": ", Value and CRLF
}

// kind marks the names that the engine itself understands.
type kind uint8

const (
	kindOther kind = iota
	kindHost
	kindConnection
	kindHop // hop by hop in every case: never forwarded
	kindTE
	kindUpgrade
	kindTrailer
	kindExpect
	kindContentLength
	kindTransferEncoding
	kindAuthorization
	kindContentType
	kindTraceparent
	kindCookie
	kindShadow // spelled with '_' but folds to a name above: never forwarded
)

// byte classes of field names and values
const (
	isToken = 1 << iota
	isUnderscore
	isValue
)

var class = func() (t [256]byte) {
	for _, c := range []byte("!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ") {
		t[c] |= isToken
	}
	t['_'] |= isUnderscore
	for i := 0x20; i < 256; i++ {
		if i != 0x7f {
			t[i] |= isValue
		}
	}
	t['\t'] |= isValue
	return t
}()

func token(b []byte) bool {
	ok := byte(isToken)
	for _, c := range b {
		ok &= class[c]
	}
	return len(b) > 0 && ok != 0
}

// fold compares b, a token, with a lower-case name of letters, digits and '-'.
func fold(b []byte, lower string) bool {
	if len(b) != len(lower) {
		return false
	}
	for i := range b {
		if b[i]|0x20 != lower[i] {
			return false
		}
	}
	return true
}

// classify finds the kind of a name.
func classify(name []byte) kind {
	switch len(name) {
	case 2:
		return pick(name, "te", kindTE)
	case 4:
		return pick(name, "host", kindHost)
	case 6:
		return max(pick(name, "expect", kindExpect), pick(name, "cookie", kindCookie))
	case 7:
		return max(pick(name, "upgrade", kindUpgrade), pick(name, "trailer", kindTrailer))
	case 10:
		return max(pick(name, "connection", kindConnection), pick(name, "keep-alive", kindHop))
	case 11:
		return pick(name, "traceparent", kindTraceparent)
	case 12:
		return pick(name, "content-type", kindContentType)
	case 13:
		return pick(name, "authorization", kindAuthorization)
	case 14:
		return max(pick(name, "content-length", kindContentLength), pick(name, "http2-settings", kindHop))
	case 16:
		return pick(name, "proxy-connection", kindHop)
	case 17:
		return pick(name, "transfer-encoding", kindTransferEncoding)
	case 18:
		return pick(name, "proxy-authenticate", kindHop)
	case 19:
		return pick(name, "proxy-authorization", kindHop)
	}
	return kindOther
}

func pick(name []byte, lower string, k kind) kind {
	if fold(name, lower) {
		return k
	}
	return kindOther
}

// singleton says whether a second line of this kind is a mistake.
func (k kind) singleton() bool {
	switch k {
	case kindHost, kindExpect, kindContentLength, kindTransferEncoding,
		kindAuthorization, kindContentType, kindTraceparent:
		return true
	}
	return false
}

// framing is what the field lines say about the body and the connection.
type framing struct {
	length    int64 // -1 when not given
	chunked   bool
	close     bool
	upgrade   bool // Connection names Upgrade
	nominated int  // how many other fields Connection names
	seen      uint32
}

// parseFields splits b, whole lines each ended by CRLF, appending to fields. It
// reads anew what is not as said, the lines of the head before.
func parseFields(fields []Field, b []byte, lim *Limits, f *framing, said *lines) ([]Field, error) {
	rd := said.read(b)
	fields, err := splitFields(fields, b, lim, f, &rd)
	rd.end(b, err == nil)
	switch {
	case err != nil:
		return fields, err
	case f.chunked && f.length >= 0:
		return fields, refuse(ReasonFraming, "both Content-Length and Transfer-Encoding; send one of them")
	case f.nominated > 0:
		return strip(fields), nil
	}
	return fields, nil
}

func splitFields(fields []Field, b []byte, lim *Limits, f *framing, rd *reading) ([]Field, error) {
	f.length = -1
	for len(b) > 0 {
		fd, size := rd.again(b)
		known := size > 0
		if !known {
			i := bytes.IndexByte(b, '\n')
			if i < 1 || b[i-1] != '\r' {
				return fields, refuse(ReasonLineEnding, "a line ends in a bare LF; lines end in CRLF")
			}
			size = i + 1
		}
		if len(fields) == lim.Headers {
			return fields, refuseAs(http.StatusRequestHeaderFieldsTooLarge, ReasonTooManyFields, "more field lines than the limit")
		}
		if !known {
			from, err := parseField(&fd, b[:size-2], lim)
			if err != nil {
				return fields, err
			}
			rd.note(&fd, size, from)
		}
		b = b[size:]
		if fd.kind != kindOther {
			if err := f.note(&fd); err != nil {
				return fields, err
			}
		}
		fields = append(fields, fd)
	}
	return fields, nil
}

// parseField reads one line without its CRLF (RFC 9112 section 5), and says
// where the value begins.
func parseField(fd *Field, line []byte, lim *Limits) (from int, err error) {
	if len(line) > 0 && (line[0] == ' ' || line[0] == '\t') {
		return 0, refuse(ReasonFolded, "a field line is folded; each field stands on one line")
	}
	some, colon := byte(0), 0
	for ; colon < len(line); colon++ {
		c := class[line[colon]]
		if c&isToken == 0 {
			break
		}
		some |= c
	}
	if colon == 0 || colon == len(line) || line[colon] != ':' {
		return 0, refuse(ReasonFieldName, "a field line has no name before a colon, or one with a byte that names may not hold")
	}
	name, value := line[:colon], line[colon+1:]
	if !validValue(value) {
		return 0, refuse(ReasonFieldValue, "a field value holds a control byte")
	}
	for from = colon + 1; from < len(line) && (line[from] == ' ' || line[from] == '\t'); from++ {
	}
	*fd = Field{Name: name, Value: trim(value)}
	fd.plain = from == colon+2 && from+len(fd.Value) == len(line) && line[colon+1] == ' '
	if some&isUnderscore == 0 {
		fd.kind = classify(name)
		return from, nil
	}
	if lim.RefuseUnderscore {
		return 0, refuse(ReasonFieldName, "a field name holds an underscore")
	}
	if foldsToKnown(name) {
		fd.kind = kindShadow
	}
	return from, nil
}

// validValue accepts visible bytes, blanks and bytes above 0x7f (RFC 9110
// section 5.5), eight at a time where no byte is in doubt.
func validValue(b []byte) bool {
	const ones = 0x0101010101010101
	for len(b) >= 8 {
		x := binary.LittleEndian.Uint64(b)
		del := x ^ 0x7f*ones
		if ((x-0x20*ones)&^x|(del-ones)&^del)&(0x80*ones) != 0 {
			break // a control byte, or one that only looks like it: see below
		}
		b = b[8:]
	}
	ok := byte(isValue)
	for _, c := range b {
		ok &= class[c]
	}
	return ok != 0
}

// foldsToKnown says whether name becomes a known one when each '_' is read as
// '-', as CGI-like applications do.
func foldsToKnown(name []byte) bool {
	var b [20]byte
	if len(name) > len(b) {
		return false
	}
	for i, c := range name {
		if c == '_' {
			c = '-'
		}
		b[i] = c
	}
	return classify(b[:len(name)]) != kindOther
}

// note takes in one field of a known kind.
func (f *framing) note(fd *Field) error {
	if fd.kind.singleton() {
		if f.seen&(1<<fd.kind) != 0 {
			return refuse(ReasonDuplicate, "a field that may stand once stands twice")
		}
		f.seen |= 1 << fd.kind
	}
	switch fd.kind {
	case kindContentLength:
		n, ok := parseLength(fd.Value)
		if !ok {
			return refuse(ReasonContentLength, "Content-Length is not one plain decimal number")
		}
		f.length = n
	case kindTransferEncoding:
		if !foldToken(fd.Value, "chunked") {
			return refuseAs(http.StatusNotImplemented, ReasonTransferEncoding, "Transfer-Encoding is not exactly chunked")
		}
		f.chunked = true
	case kindConnection:
		return f.connection(fd.Value)
	}
	return nil
}

// maxNominated bounds the work of comparing options with field names.
const maxNominated = 16

// connection reads the options of one Connection field.
func (f *framing) connection(v []byte) error {
	for t, rest, ok := nextItem(v); ok; t, rest, ok = nextItem(rest) {
		switch {
		case len(t) == 0:
		case foldToken(t, "close"):
			f.close = true
		case foldToken(t, "upgrade"):
			f.upgrade = true
		case foldToken(t, "keep-alive"), foldToken(t, "te"):
		case !token(t):
			return refuse(ReasonConnection, "Connection holds something other than option names")
		case protected.Has(t):
			return refuse(ReasonConnection, "Connection names a field that a client may not remove")
		default:
			if f.nominated++; f.nominated > maxNominated {
				return refuse(ReasonConnection, "Connection names more than 16 fields")
			}
		}
	}
	return nil
}

// protected are the fields that a Connection option may not take away.
var protected = NewNameSet("host", "authorization", "cookie", "set-cookie", "expect", "transfer-encoding",
	"content-*", "forwarded", "x-forwarded-*", "x-real-ip", "x-request-id", "traceparent", "tracestate",
	"baggage", "sallyport-*", "cache-control", "date", "location", "origin", "referer")

// strip removes the fields that Connection names, before anything looks at
// them.
func strip(fields []Field) []Field {
	kept := fields[:0:len(fields)]
	for i := range fields {
		if fields[i].kind != kindConnection && named(fields, fields[i].Name) {
			fields[i].kind = kindShadow
		}
	}
	for i := range fields {
		if fields[i].kind != kindShadow {
			kept = append(kept, fields[i])
		}
	}
	return kept
}

func named(fields []Field, name []byte) bool {
	for i := range fields {
		if fields[i].kind != kindConnection {
			continue
		}
		for t, rest, ok := nextItem(fields[i].Value); ok; t, rest, ok = nextItem(rest) {
			if bytes.EqualFold(t, name) && hopOption(t) {
				return true
			}
		}
	}
	return false
}

// hopOption leaves out the options that are not field names here; Upgrade and
// TE are dealt with by kind.
func hopOption(t []byte) bool {
	return !foldToken(t, "close") && !foldToken(t, "upgrade") && !foldToken(t, "te")
}

// nextItem cuts the first element off a comma-separated list.
func nextItem(v []byte) (item, rest []byte, ok bool) {
	if v == nil {
		return nil, nil, false
	}
	if i := bytes.IndexByte(v, ','); i >= 0 {
		return trim(v[:i]), v[i+1:], true
	}
	return trim(v), nil, true
}

// foldToken is fold for text that was not checked to be a token.
func foldToken(b []byte, lower string) bool { return fold(b, lower) && token(b) }

func trim(v []byte) []byte {
	for len(v) > 0 && (v[0] == ' ' || v[0] == '\t') {
		v = v[1:]
	}
	for len(v) > 0 && (v[len(v)-1] == ' ' || v[len(v)-1] == '\t') {
		v = v[:len(v)-1]
	}
	return v
}

// parseLength reads a decimal number below 10^18 without sign or leading zero.
func parseLength(v []byte) (int64, bool) {
	if len(v) == 0 || len(v) > 18 || (v[0] == '0' && len(v) > 1) {
		return 0, false
	}
	var n int64
	for _, c := range v {
		if c < '0' || c > '9' {
			return 0, false
		}
		n = n*10 + int64(c-'0')
	}
	return n, true
}

// get finds the first field with this name, in any case.
func get(fields []Field, name string) []byte {
	for i := range fields {
		if len(fields[i].Name) == len(name) && equalFold(fields[i].Name, name) {
			return fields[i].Value
		}
	}
	return nil
}

func equalFold(b []byte, s string) bool {
	for i := range b {
		if lower(b[i]) != lower(s[i]) {
			return false
		}
	}
	return true
}

func lower(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		return c | 0x20
	}
	return c
}

// A NameSet is a fixed set of field names, matched in any case and with '_'
// read as '-'. The nil set is empty.
type NameSet struct {
	first    [256]bool // first bytes of members, folded
	names    map[string]struct{}
	prefixes []string
	longest  int
}

// NewNameSet makes a set; a name that ends in '*' stands for every name with
// that beginning.
func NewNameSet(names ...string) *NameSet {
	s := &NameSet{names: make(map[string]struct{}, len(names))}
	for _, n := range names {
		b := make([]byte, 0, len(n))
		for i := range len(n) {
			b = append(b, foldName(n[i]))
		}
		if len(b) == 0 || b[0] == '*' {
			continue
		}
		s.first[b[0]] = true
		if b[len(b)-1] == '*' {
			s.prefixes = append(s.prefixes, string(b[:len(b)-1]))
			continue
		}
		s.names[string(b)] = struct{}{}
		s.longest = max(s.longest, len(b))
	}
	return s
}

func foldName(c byte) byte {
	if c == '_' {
		return '-'
	}
	return lower(c)
}

// Has says whether name is in the set.
func (s *NameSet) Has(name []byte) bool {
	if s == nil || len(name) == 0 || !s.first[foldName(name[0])] {
		return false
	}
	for _, p := range s.prefixes {
		if len(name) >= len(p) && foldsTo(name[:len(p)], p) {
			return true
		}
	}
	var b [64]byte
	if len(name) > s.longest || len(name) > len(b) {
		return false
	}
	for i, c := range name {
		b[i] = foldName(c)
	}
	_, ok := s.names[string(b[:len(name)])]
	return ok
}

func foldsTo(b []byte, s string) bool {
	for i := range b {
		if foldName(b[i]) != s[i] {
			return false
		}
	}
	return true
}
