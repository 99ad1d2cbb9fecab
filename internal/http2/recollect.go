package http2

import "bytes"

// A recollection makes field sections of heads in HTTP/1.1, and keeps the last
// one, line by line. The encoder has no table, so that a line that stands where
// it stood makes the same bytes again; and a head is mostly like the one before.
type recollection struct {
	block []byte // what is made
	lines []line // of it

	was   []byte // what was made last
	past  []line // of it
	text  []byte // the lines that it was made of
	start int    // where in it their fields begin
}

// A line is where one ends in a head and in its field section, and what it says.
type line struct {
	text, block int
	says
}

// says is what lines tell beside their fields.
type says struct {
	length    int64 // of the body, and 1 more; 0: nothing is said of it
	chunks    bool
	webSocket bool
}

// maxRecalled is the size up to which a head is kept.
const maxRecalled = 4 << 10

// begin begins a section.
func (r *recollection) begin() {
	r.block, r.was = r.was[:0], r.block
	if cap(r.block) > 2*maxRecalled {
		r.block = nil
	}
	r.lines, r.past = r.past[:0], r.lines
}

// fields encodes lines, each ended by CRLF, up to the blank one, leaving out those
// that belong to HTTP/1.1 alone. n is how much that was.
func (r *recollection) fields(p []byte) (n int, all says, err error) {
	start := len(r.block)
	old := line{block: r.start}
	for i := 0; ; i++ {
		rest := p[n:]
		if len(rest) >= 2 && rest[0] == '\r' && rest[1] == '\n' {
			n += 2
			break
		}
		from := old
		if i < len(r.past) {
			old = r.past[i]
		}
		k, said := old.text-from.text, old.says
		if k > 0 && len(rest) >= k && string(rest[:k]) == string(r.text[from.text:old.text]) {
			r.block = append(r.block, r.was[from.block:old.block]...)
		} else if k, said, err = r.field(rest); err != nil {
			r.lines = r.lines[:0]
			return 0, says{}, err
		}
		n += k
		r.lines = append(r.lines, line{n, len(r.block), said})
		if said.length > 0 {
			all.length = said.length
		}
		all.chunks = all.chunks || said.chunks
		all.webSocket = all.webSocket || said.webSocket
	}
	if n > maxRecalled {
		r.lines = r.lines[:0]
		return n, all, nil
	}
	r.text, r.start = append(r.text[:0], p[:n]...), start
	return n, all, nil
}

// field encodes a line, whose length is n.
func (r *recollection) field(p []byte) (n int, said says, err error) {
	end := bytes.IndexByte(p, '\n')
	colon := bytes.IndexByte(p, ':')
	if colon < 1 || end < colon || p[end-1] != '\r' {
		return 0, says{}, errUnclear
	}
	name, value := p[:colon], p[colon+1:end-1]
	for len(value) > 0 && value[0] == ' ' {
		value = value[1:]
	}
	n = end + 1
	switch len(name) {
	case 4:
		if is(name, "host") {
			return n, said, nil
		}
	case 7:
		if is(name, "upgrade") {
			said.webSocket = string(value) == "websocket"
			return n, said, nil
		}
	case 10:
		if is(name, "connection") || is(name, "keep-alive") {
			return n, said, nil
		}
	case 14:
		if is(name, "content-length") {
			length, ok := parseLength(value)
			if !ok {
				return 0, says{}, errUnclear
			}
			said.length = length + 1
		}
	case 16:
		if is(name, "proxy-connection") {
			return n, said, nil
		}
	case 17:
		if is(name, "transfer-encoding") {
			said.chunks = true
			return n, said, nil
		}
	case 20:
		if is(name, "sec-websocket-accept") {
			return n, said, nil
		}
	}
	r.block = appendLine(r.block, name, value)
	return n, said, nil
}

// is compares a name of any case with one of letters and '-' in lower case.
func is(name []byte, low string) bool {
	if len(name) != len(low) {
		return false
	}
	for i := range name {
		if name[i]|0x20 != low[i] {
			return false
		}
	}
	return true
}
