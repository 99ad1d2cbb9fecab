package http2

import (
	"strings"

	"golang.org/x/net/http2/hpack"
)

// A section is one field section as it was received, checked for what HTTP/2
// forbids (RFC 9113 section 8.2 and 8.3) while it is decoded. What HTTP/1.1
// forbids besides is for who reads the head that is made of it.
type section struct {
	dec  *hpack.Decoder
	most int // bytes of the decoded section

	// The pseudo fields.
	method, scheme, authority, path, protocol, status string
	pseudo                                            uint8 // those that have come

	lines   []byte // the other fields, as lines of HTTP/1.1
	cookies []byte // the crumbs of Cookie
	host    string // Host, when it is there
	hosted  bool
	length  int64 // content-length; -1 without
	size    int
	regular bool // a field has come that is not a pseudo field
	answer  bool // it is of a response
	bad     bool // it holds what HTTP/2 forbids
	large   bool // it is larger than may be
}

const (
	pseudoMethod = 1 << iota
	pseudoScheme
	pseudoAuthority
	pseudoPath
	pseudoProtocol
	pseudoStatus
)

// tableSize is that of our table of HPACK.
const tableSize = 4096

func (s *section) init(most int) {
	s.most = most
	s.dec = hpack.NewDecoder(tableSize, s.field)
	s.dec.SetMaxStringLength(2 * most)
}

// decode takes a whole field section in. An error ends the connection: the table
// of HPACK is not what the peer believes any more.
func (s *section) decode(block []byte, answer bool) error {
	*s = section{dec: s.dec, most: s.most, lines: s.lines[:0], cookies: s.cookies[:0], length: -1, answer: answer}
	s.dec.SetEmitEnabled(true)
	if _, err := s.dec.Write(block); err != nil {
		return violated(Compression, BadBlock)
	}
	if s.dec.Close() != nil {
		return violated(Compression, BadBlock)
	}
	return nil
}

// field takes one field in.
func (s *section) field(f hpack.HeaderField) {
	if s.size += len(f.Name) + len(f.Value) + 32; s.size > s.most {
		s.large = true
		s.dec.SetEmitEnabled(false) // the table must be kept all the same
		return
	}
	if !validValue(f.Value) {
		s.bad = true
		return
	}
	if strings.HasPrefix(f.Name, ":") {
		s.special(f.Name, f.Value)
		return
	}
	s.regular = true
	if !validName(f.Name) {
		s.bad = true
		return
	}
	switch f.Name {
	case "connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade":
		s.bad = true
		return
	case "te":
		s.bad = s.bad || f.Value != "trailers"
	case "host":
		s.bad = s.bad || s.hosted
		s.host, s.hosted = f.Value, true
		return
	case "content-length":
		n, ok := parseLength(f.Value)
		if !ok || s.length >= 0 {
			s.bad = true
		}
		s.length = n
		return
	case "cookie":
		if len(s.cookies) > 0 {
			s.cookies = append(s.cookies, "; "...)
		}
		s.cookies = append(s.cookies, f.Value...)
		return
	}
	s.lines = appendField(s.lines, f.Name, f.Value)
}

// special takes a pseudo field in: each once, before all others.
func (s *section) special(name, value string) {
	var bit uint8
	switch name {
	case ":method":
		bit, s.method = pseudoMethod, value
	case ":scheme":
		bit, s.scheme = pseudoScheme, value
	case ":authority":
		bit, s.authority = pseudoAuthority, value
	case ":path":
		bit, s.path = pseudoPath, value
	case ":protocol":
		bit, s.protocol = pseudoProtocol, value
	case ":status":
		bit, s.status = pseudoStatus, value
	}
	if bit == 0 || s.pseudo&bit != 0 || s.regular || s.answer != (bit == pseudoStatus) {
		s.bad = true
	}
	s.pseudo |= bit
}

func appendField(b []byte, name, value string) []byte {
	b = append(append(b, name...), ": "...)
	return append(append(b, value...), "\r\n"...)
}

// validName accepts tokens in lower case (RFC 9113 section 8.2.1).
func validName(s string) bool {
	for i := range len(s) {
		switch c := s[i]; {
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9', c == '-', c == '_':
		case c >= 0x7f || strings.IndexByte("!#$%&'*+.^`|~", c) < 0:
			return false
		}
	}
	return len(s) > 0
}

// validValue accepts what a line of HTTP/1.1 can hold, without blanks around it.
func validValue(s string) bool {
	if s == "" {
		return true
	}
	if first, last := s[0], s[len(s)-1]; first == ' ' || first == '\t' || last == ' ' || last == '\t' {
		return false
	}
	for i := range len(s) {
		if c := s[i]; c < ' ' && c != '\t' || c == 0x7f {
			return false
		}
	}
	return true
}

// parseLength reads a decimal number below 10^18 without sign or leading zero.
func parseLength(s string) (int64, bool) {
	if s == "" || len(s) > 18 || s[0] == '0' && len(s) > 1 {
		return 0, false
	}
	var n int64
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return 0, false
		}
		n = n*10 + int64(s[i]-'0')
	}
	return n, true
}
