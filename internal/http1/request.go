package http1

import (
	"bytes"
	"net/http"
	"net/netip"
	"time"
)

// Form is the form of a request target (RFC 9112 section 3.2).
type Form uint8

// The four forms.
const (
	Origin    Form = iota // /path?query
	Absolute              // http://host/path
	Authority             // host:port, CONNECT only
	Asterisk              // *, OPTIONS only
)

// Framing says how the end of a body is found (RFC 9112 section 6).
type Framing uint8

// The framings.
const (
	NoBody     Framing = iota
	Length             // Content-Length bytes
	Chunked            // chunked transfer coding
	UntilClose         // responses only: all until the connection ends
)

// Body is the framing of a message body.
type Body struct {
	Framing Framing
	Length  int64 // bytes, for Length
}

// Empty says that no body bytes follow the head.
func (b Body) Empty() bool { return b.Framing == NoBody || b.Framing == Length && b.Length == 0 }

// A Request is one parsed request head. Its slices are views that hold until
// the next ReadRequest on the same Conn; reading the body keeps them. Use one
// Request for a connection's life: it reuses what it allocated.
type Request struct {
	// Method is the method, upper case.
	Method []byte
	// Target is the request target as received.
	Target []byte
	Form   Form
	// Scheme is "http" or "https" for the absolute form, else "".
	Scheme string
	// Authority is host or host:port in lower case, checked. It comes from the
	// target when that has one, and then Host was the same.
	Authority []byte
	// Path is the canonical path (see CleanPath): what is forwarded, and but for
	// parameters (see PathText) judged and logged. "*" for the asterisk form, nil for CONNECT.
	Path []byte
	// RawQuery is what stands behind '?', as received.
	RawQuery []byte
	Body     Body
	// Minor is the minor version, 0 or 1.
	Minor int
	// KeepAlive says that the client keeps the connection open.
	KeepAlive bool
	// Expect100 says that the client waits for 100 before it sends the body.
	// Exchange answers it; the field is not forwarded.
	Expect100 bool
	// Upgrade says that the client asks for websocket. Any other upgrade is
	// ignored and not forwarded.
	Upgrade bool
	// TETrailers says that the client accepts trailers.
	TETrailers bool
	// Fields are the field lines, without those that Connection named.
	Fields []Field

	pathBuf, authBuf []byte
	bareBuf          []byte
	texts            [8]string
	authText         string

	started   bool // body bytes were taken off the connection: no replay
	continued bool // 100 was sent
}

// Get finds the first field of this name, in any case; nil when absent.
func (r *Request) Get(name string) []byte { return get(r.Fields, name) }

// streams says that both directions may well be in use at once, as in gRPC,
// whose calls always ask for trailers.
func (r *Request) streams() bool { return r.TETrailers && r.Body.Framing == Chunked }

// Verb is Method as a string, without allocation for the usual ones.
func (r *Request) Verb() string {
	switch string(r.Method) {
	case "GET":
		return "GET"
	case "HEAD":
		return "HEAD"
	case "POST":
		return "POST"
	case "PUT":
		return "PUT"
	case "PATCH":
		return "PATCH"
	case "DELETE":
		return "DELETE"
	case "OPTIONS":
		return "OPTIONS"
	case "CONNECT":
		return "CONNECT"
	case "TRACE":
		return "TRACE"
	}
	return string(r.Method)
}

// PathText is Path as it is judged and logged: without the parameters of its
// segments, which some applications cut off, so that no rule speaks of them.
// Paths that repeat on a connection share their string, so that a keep-alive
// client costs no allocation.
func (r *Request) PathText() string {
	p := r.Path
	if bytes.IndexByte(p, ';') >= 0 {
		r.bareBuf = appendBare(r.bareBuf[:0], p)
		p = r.bareBuf
	}
	if len(p) == 0 || len(p) > 512 {
		return string(p)
	}
	slot := &r.texts[(len(p)^int(p[len(p)-1]))%len(r.texts)]
	if *slot != string(p) {
		*slot = string(p)
	}
	return *slot
}

// AuthorityText is Authority as a string, shared as in PathText.
func (r *Request) AuthorityText() string {
	if r.authText != string(r.Authority) {
		r.authText = string(r.Authority)
	}
	return r.authText
}

// ReadRequest reads the next request head into r. It returns io.EOF when the
// client closed before the first byte, ErrIdleTimeout when none came,
// io.ErrUnexpectedEOF and ErrHeadTimeout inside a head, and *ProtocolError for
// a request to answer with its Status and close. The body of the request
// before must have been read.
func (c *Conn) ReadRequest(r *Request) error {
	r.reset()
	if c.r == c.w {
		c.Rest()
		c.readFrom(c.Now(), c.lim.IdleTimeout)
	}
	c.now = time.Time{}
	c.trailers = false
	h, err := c.head(true)
	if err != nil {
		return err
	}
	return r.parse(h, &c.lim, &c.said)
}

func (r *Request) reset() {
	r.Method, r.Target, r.Authority, r.Path, r.RawQuery = nil, nil, nil, nil, nil
	r.Form, r.Scheme, r.Body, r.Minor = Origin, "", Body{}, 0
	r.KeepAlive, r.Expect100, r.Upgrade, r.TETrailers = false, false, false, false
	r.Fields, r.pathBuf, r.authBuf = r.Fields[:0], r.pathBuf[:0], r.authBuf[:0]
	r.started, r.continued = false, false
}

// parse reads a head that ends in the CRLF of its last line.
func (r *Request) parse(h []byte, lim *Limits, said *lines) error {
	end := bytes.IndexByte(h, '\n')
	if end < 1 || h[end-1] != '\r' {
		return refuse(ReasonLineEnding, "the request line does not end in CRLF")
	}
	if err := r.line(h[:end-1], lim); err != nil {
		return err
	}
	var f framing
	var err error
	if r.Fields, err = parseFields(r.Fields, h[end+1:], lim, &f, said); err != nil {
		return err
	}
	if err := r.host(&f); err != nil {
		return err
	}
	if err := r.framing(&f); err != nil {
		return err
	}
	return r.options(&f)
}

// line reads method, target and version (RFC 9112 section 3), separated by
// exactly one space.
func (r *Request) line(b []byte, lim *Limits) error {
	sp := bytes.IndexByte(b, ' ')
	last := bytes.LastIndexByte(b, ' ')
	if sp < 1 || last == sp {
		return refuse(ReasonStartLine, "the request line is not method, target and version")
	}
	r.Method, r.Target = b[:sp], b[sp+1:last]
	if len(r.Method) > 32 {
		return refuseAs(http.StatusNotImplemented, ReasonMethod, "the method is longer than 32 bytes")
	}
	for _, c := range r.Method {
		if (c < 'A' || c > 'Z') && c != '-' {
			return refuse(ReasonMethod, "the method is not a word of upper-case letters")
		}
	}
	switch v := b[last+1:]; {
	case string(v) == "HTTP/1.1":
		r.Minor = 1
	case string(v) == "HTTP/1.0":
		r.Minor = 0
	case len(v) == 8 && string(v[:5]) == "HTTP/" && digit(v[5]) && v[6] == '.' && digit(v[7]):
		return refuseAs(http.StatusHTTPVersionNotSupported, ReasonVersion, "the version is neither HTTP/1.1 nor HTTP/1.0")
	default:
		return refuse(ReasonVersion, "the request line does not end in a version")
	}
	if len(r.Target) > lim.Target {
		return refuseAs(http.StatusRequestURITooLong, ReasonTargetTooLong, "the request target is longer than the limit")
	}
	// What is plain in a path is so in a target.
	plain := 0
	if len(r.Target) > 0 && r.Target[0] == '/' {
		plain = plainPath(r.Target)
	}
	for _, c := range r.Target[plain:] {
		if c <= ' ' || c >= 0x7f || c == '#' {
			return refuse(ReasonTarget, "the request target holds a byte that must be escaped, or a fragment")
		}
	}
	return r.target(plain, lim)
}

func digit(c byte) bool { return '0' <= c && c <= '9' }

// target tells the four forms apart. It begins with a plain path of that length,
// unless that is 0.
func (r *Request) target(plain int, lim *Limits) error {
	t, connect := r.Target, string(r.Method) == "CONNECT"
	switch {
	case connect:
		r.Form = Authority
		if !r.authority(t) || bytes.IndexByte(trimV6(t), ':') < 0 {
			return refuse(ReasonAuthority, "CONNECT needs host:port as its target")
		}
		return nil
	case len(t) > 0 && t[0] == '/':
		r.Form = Origin
		return r.path(t, plain, lim)
	case len(t) == 1 && t[0] == '*':
		r.Form = Asterisk
		if string(r.Method) != "OPTIONS" {
			return refuse(ReasonTarget, "the target * belongs to OPTIONS alone")
		}
		r.Path = t
		return nil
	}
	scheme := bytes.IndexByte(t, ':')
	switch {
	case scheme == 4 && foldToken(t[:4], "http"):
		r.Scheme = "http"
	case scheme == 5 && foldToken(t[:5], "https"):
		r.Scheme = "https"
	}
	if r.Scheme == "" || !bytes.HasPrefix(t[scheme:], []byte("://")) {
		return refuse(ReasonTarget, "the target is neither a path nor an http or https URI")
	}
	r.Form = Absolute
	t = t[scheme+3:]
	end := bytes.IndexAny(t, "/?")
	if end < 0 {
		end = len(t)
	}
	if !r.authority(t[:end]) {
		return refuse(ReasonAuthority, "the target's authority is not host or host:port")
	}
	if t = t[end:]; len(t) == 0 && string(r.Method) == "OPTIONS" {
		r.Path = asterisk
		return nil
	}
	return r.path(t, plainPath(t), lim)
}

var asterisk, slash = []byte("*"), []byte("/")

// path splits the query off and makes the path canonical, of which the first
// bytes are plain.
func (r *Request) path(t []byte, plain int, lim *Limits) (err error) {
	if i := bytes.IndexByte(t[plain:], '?'); i >= 0 {
		i += plain
		t, r.RawQuery = t[:i], t[i+1:]
	}
	switch {
	case len(t) == 0:
		r.Path = slash // absolute form without path (RFC 9110 section 4.2.3)
	case plain == len(t):
		r.Path = t
	default:
		if r.pathBuf, err = CleanPath(r.pathBuf, t, lim.AllowParams); err != nil {
			return err
		}
		r.Path = r.pathBuf
	}
	return nil
}

// authority checks host[:port] and keeps it in lower case. The one that was good
// before is good.
func (r *Request) authority(b []byte) bool {
	if len(b) > 0 && string(b) == r.authText {
		r.Authority = b
		return true
	}
	host, port := b, []byte(nil)
	if v6 := trimV6(b); len(v6) != len(b) {
		host = b[:len(b)-len(v6)]
		if len(v6) > 0 && v6[0] != ':' {
			return false
		}
		port = v6
	} else if i := bytes.IndexByte(b, ':'); i >= 0 {
		host, port = b[:i], b[i:]
	}
	if len(port) > 0 && !validPort(port[1:]) || !validHost(host) {
		return false
	}
	r.Authority = b
	for _, c := range b {
		if 'A' <= c && c <= 'Z' {
			r.authBuf = r.authBuf[:0]
			for _, c := range b {
				r.authBuf = append(r.authBuf, lower(c))
			}
			r.Authority = r.authBuf
			return true
		}
	}
	r.authText = string(b)
	return true
}

// trimV6 cuts a bracketed address off the front.
func trimV6(b []byte) []byte {
	if len(b) > 0 && b[0] == '[' {
		if i := bytes.IndexByte(b, ']'); i > 0 {
			return b[i+1:]
		}
	}
	return b
}

func validPort(b []byte) bool {
	n, ok := parseLength(b)
	return ok && n > 0 && n < 1<<16
}

// validHost accepts names of letters, digits, '-' and '_' in labels joined by
// single dots, IPv4, and IPv6 in brackets without zone.
func validHost(h []byte) bool {
	if len(h) == 0 || len(h) > 253 {
		return false
	}
	if h[0] == '[' {
		if len(h) < 4 || h[len(h)-1] != ']' {
			return false
		}
		a, err := netip.ParseAddr(string(h[1 : len(h)-1]))
		return err == nil && a.Is6() && a.Zone() == ""
	}
	prev := byte('.')
	for _, c := range h {
		switch {
		case c == '.' && prev == '.':
			return false
		case c == '.', c == '-', c == '_', digit(c), 'a' <= lower(c) && lower(c) <= 'z':
		default:
			return false
		}
		prev = c
	}
	return prev != '.'
}

// host settles the authority from target and Host (RFC 9112 section 3.2).
func (r *Request) host(f *framing) error {
	if f.seen&(1<<kindHost) == 0 {
		if r.Minor == 0 && len(r.Authority) > 0 {
			return nil
		}
		return refuse(ReasonHost, "Host is missing")
	}
	var v []byte
	for i := range r.Fields {
		if r.Fields[i].kind == kindHost {
			v = r.Fields[i].Value
		}
	}
	if len(r.Authority) == 0 {
		if !r.authority(v) {
			return refuse(ReasonHost, "Host is not host or host:port")
		}
		return nil
	}
	a := r.Authority
	if r.Form == Authority && len(v) < len(a) && a[len(v)] == ':' {
		a = a[:len(v)] // CONNECT: Host may leave the port out
	}
	if len(v) != len(a) || !equalFold(v, string(a)) {
		return refuse(ReasonHost, "Host differs from the authority in the target")
	}
	return nil
}

// framing settles the body (RFC 9112 section 6.3).
func (r *Request) framing(f *framing) error {
	switch {
	case f.chunked && r.Minor == 0:
		return refuse(ReasonFraming, "Transfer-Encoding does not exist in HTTP/1.0")
	case f.chunked:
		r.Body = Body{Framing: Chunked}
	case f.length >= 0:
		r.Body = Body{Framing: Length, Length: f.length}
	}
	if !r.Body.Empty() && (r.Form == Authority || string(r.Method) == "TRACE") {
		return refuse(ReasonFraming, "CONNECT and TRACE have no body")
	}
	r.KeepAlive = r.Minor == 1 && !f.close
	return nil
}

// options reads the fields that ask for special treatment.
func (r *Request) options(f *framing) error {
	for i := range r.Fields {
		fd := &r.Fields[i]
		switch fd.kind {
		case kindExpect:
			if !equalFoldLen(fd.Value, "100-continue") {
				return refuseAs(http.StatusExpectationFailed, ReasonExpect, "Expect is not 100-continue")
			}
			r.Expect100 = r.Minor == 1 && !r.Body.Empty()
		case kindTE:
			for t, rest, ok := nextItem(fd.Value); ok; t, rest, ok = nextItem(rest) {
				r.TETrailers = r.TETrailers || foldToken(t, "trailers")
			}
		case kindUpgrade:
			r.Upgrade = r.Minor == 1 && f.upgrade && equalFoldLen(fd.Value, "websocket") &&
				string(r.Method) == "GET" && r.Body.Empty() && f.seen&(1<<kindUpgrade) == 0
			f.seen |= 1 << kindUpgrade
		}
	}
	return nil
}

func equalFoldLen(b []byte, s string) bool { return len(b) == len(s) && equalFold(b, s) }
