package http2

import (
	"bytes"
	"strings"
)

// A section is one field section as it was received, checked for what HTTP/2
// forbids (RFC 9113 section 8.2 and 8.3) while it is decoded. What HTTP/1.1
// forbids besides is for who reads the head that is made of it.
type section struct {
	table table
	most  int    // bytes of the decoded section
	line  []byte // where a field is put together

	special [6][]byte // the pseudo fields, by their class
	pseudo  uint8     // those that have come

	lines   []byte // the other fields, as lines of HTTP/1.1
	cookies []byte // the crumbs of Cookie
	host    []byte // Host, when it is there
	length  int64  // content-length; -1 without
	size    int
	found
}

// found is what of a section is told by yes or no.
type found struct {
	hosted  bool
	regular bool // a field has come that is not a pseudo field
	tailed  bool // trailers are to be expected behind it
	bad     bool // it holds what HTTP/2 forbids
	large   bool // it is larger than may be
}

// The bits of pseudo.
const (
	pseudoMethod = 1 << iota
	pseudoScheme
	pseudoAuthority
	pseudoPath
	pseudoProtocol
	pseudoStatus
)

func (s *section) method() []byte    { return s.special[0] }
func (s *section) scheme() []byte    { return s.special[classScheme-classMethod] }
func (s *section) authority() []byte { return s.special[classAuthority-classMethod] }
func (s *section) path() []byte      { return s.special[classPath-classMethod] }
func (s *section) protocol() []byte  { return s.special[classProtocol-classMethod] }
func (s *section) status() []byte    { return s.special[classStatus-classMethod] }

func (s *section) init(most int) { s.most, s.table.most = most, tableSize }

// begin makes ready for the next section.
func (s *section) begin() {
	for i := range s.special {
		s.special[i] = s.special[i][:0]
	}
	s.lines, s.cookies, s.host, s.pseudo, s.length, s.size = s.lines[:0], s.cookies[:0], s.host[:0], 0, -1, 0
	s.found = found{}
}

// rest gives back the memory of a large section.
func (s *section) rest() {
	if cap(s.lines)+cap(s.cookies)+cap(s.line) > keepFragment {
		*s = section{table: s.table, most: s.most}
	}
}

// add takes one field in.
func (s *section) add(f field) {
	if s.size += f.size(); s.size > s.most {
		s.large = true
		return
	}
	if f.bad || f.class == classForbidden {
		s.bad = true
		return
	}
	if classMethod <= f.class && f.class <= classStatus {
		s.pseudoField(f)
		return
	}
	s.regular = true
	switch f.class {
	case classTE:
		s.bad = s.bad || string(f.value()) != "trailers"
	case classHost:
		s.bad = s.bad || s.hosted
		s.host, s.hosted = append(s.host[:0], f.value()...), true
		return
	case classLength:
		n, ok := parseLength(f.value())
		if !ok || s.length >= 0 {
			s.bad = true
		}
		s.length = n
		return
	case classCookie:
		if len(s.cookies) > 0 {
			s.cookies = append(s.cookies, "; "...)
		}
		s.cookies = append(s.cookies, f.value()...)
		return
	case classType:
		s.tailed = s.tailed || bytes.HasPrefix(f.value(), grpcType)
	case classTrailer:
		s.tailed = true
	}
	s.lines = append(s.lines, f.line...)
}

var grpcType = []byte("application/grpc")

// pseudoField takes a pseudo field in: each once, before all others.
func (s *section) pseudoField(f field) {
	i := f.class - classMethod
	bit := uint8(1) << i
	if s.pseudo&bit != 0 || s.regular {
		s.bad = true
	}
	s.pseudo |= bit
	s.special[i] = append(s.special[i][:0], f.value()...)
}

func appendField[T []byte | string](b []byte, name string, value T) []byte {
	b = append(append(b, name...), ": "...)
	return append(append(b, value...), "\r\n"...)
}

// validName accepts tokens in lower case (RFC 9113 section 8.2.1).
func validName(s []byte) bool {
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
func validValue(s []byte) bool {
	if len(s) == 0 {
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
func parseLength(s []byte) (int64, bool) {
	if len(s) == 0 || len(s) > 18 || s[0] == '0' && len(s) > 1 {
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
