package http1

import "bytes"

// A Scrub takes a text out of a response: the head by Clean, the body as it is
// copied, however it is cut into pieces. Stars stand in its place, so that no
// length changes.
type Scrub struct {
	text []byte
	held []byte // may be the beginning of text
	out  []byte
}

// NewScrub makes a Scrub for a text, which must not be empty. It is for one
// exchange at a time.
func NewScrub(text string) *Scrub { return &Scrub{text: []byte(text)} }

// Clean takes the text out of b, in its place.
func (s *Scrub) Clean(b []byte) {
	for from := 0; ; {
		i := bytes.Index(b[from:], s.text)
		if i < 0 {
			return
		}
		for k := range s.text {
			b[from+i+k] = '*'
		}
		from += i + len(s.text)
	}
}

// feed gives what can be passed on, now that b has come: void with the next call.
// What could be the beginning of the text waits for more.
func (s *Scrub) feed(b []byte) []byte {
	s.out = append(append(s.out[:0], s.held...), b...)
	s.Clean(s.out)
	n := len(s.out)
	for k := min(len(s.text)-1, n); k > 0; k-- {
		if bytes.HasPrefix(s.text, s.out[n-k:]) {
			s.held = append(s.held[:0], s.out[n-k:]...)
			return s.out[:n-k]
		}
	}
	s.held = s.held[:0]
	return s.out
}

// rest gives what waited, at the end of the body.
func (s *Scrub) rest() []byte {
	b := s.held
	s.held = s.held[:0]
	return b
}

// scrubbed is a piece of a body as it may be passed on; end says that it is the
// last one. It is void with the next call.
func (c *Conn) scrubbed(b []byte, end bool) []byte {
	s := c.scrub
	if s == nil {
		return b
	}
	b = s.feed(b)
	if end {
		b = append(b, s.rest()...)
	}
	return b
}
