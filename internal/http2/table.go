package http2

import "math/bits"

// A class is what the name of a field means to HTTP/2.
type class uint8

const (
	classPlain class = iota
	classMethod
	classScheme
	classAuthority
	classPath
	classProtocol
	classStatus
	classForbidden // a field of the connection, no pseudo field that there is, or no name
	classTE
	classHost
	classLength
	classCookie
	classType
	classTrailer
)

// classOf tells the class of a name.
func classOf(name []byte) class {
	switch string(name) {
	case ":method":
		return classMethod
	case ":scheme":
		return classScheme
	case ":authority":
		return classAuthority
	case ":path":
		return classPath
	case ":protocol":
		return classProtocol
	case ":status":
		return classStatus
	case "te":
		return classTE
	case "host":
		return classHost
	case "content-length":
		return classLength
	case "cookie":
		return classCookie
	case "content-type":
		return classType
	case "trailer":
		return classTrailer
	case "connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade":
		return classForbidden
	}
	if !validName(name) {
		return classForbidden
	}
	return classPlain
}

// A field stands as a line of HTTP/1.1, and has been looked at: what is used again
// of a table need not be validated again.
type field struct {
	line  []byte // name, colon, blank, value, CRLF
	name  int    // length of the name
	class class
	bad   bool // the value is none
}

func (f field) value() []byte { return f.line[f.name+2 : len(f.line)-2] }

// size is what a field counts (RFC 7541 section 4.1).
func (f field) size() int { return len(f.line) - len(": \r\n") + 32 }

// tableSize is that of our table of HPACK.
const tableSize = 4096

// A table is the dynamic table of a decoder. It holds no memory before it holds a
// field.
type table struct {
	arena  []byte  // the lines of the fields, the oldest first
	ring   []entry // a power of two of them
	newest uint    // its place in the ring
	n      int     // how many there are
	size   int
	most   int // what size may be now
}

type entry struct {
	at, end uint32 // in the arena
	name    uint32
	class   class
	bad     bool
}

// at gives the field with an index of HPACK.
func (t *table) at(i int) (f field, ok bool) {
	if i < len(static) {
		return static[i], i > 0
	}
	if i -= len(static); i >= t.n {
		return field{}, false
	}
	e := &t.ring[(t.newest-uint(i))&uint(len(t.ring)-1)]
	return field{t.arena[e.at:e.end], int(e.name), e.class, e.bad}, true
}

func (t *table) oldest() *entry {
	return &t.ring[(t.newest-uint(t.n-1))&uint(len(t.ring)-1)]
}

// insert puts a field in, whose line is not of the table. One that is larger than
// the table leaves it empty.
func (t *table) insert(f field) {
	t.evict(t.most - f.size())
	if f.size() > t.most {
		return
	}
	if t.n == len(t.ring) {
		t.widen()
	}
	if len(t.arena)+len(f.line) > cap(t.arena) {
		t.pack(len(f.line))
	}
	at := len(t.arena)
	t.arena = append(t.arena, f.line...)
	t.newest++
	t.ring[t.newest&uint(len(t.ring)-1)] = entry{uint32(at), uint32(len(t.arena)), uint32(f.name), f.class, f.bad}
	t.n++
	t.size += f.size()
}

// evict drops the oldest fields until size is not above most.
func (t *table) evict(most int) {
	for t.n > 0 && t.size > most {
		e := t.oldest()
		t.size -= field{line: t.arena[e.at:e.end]}.size()
		t.n--
	}
	if t.n == 0 {
		t.arena = t.arena[:0]
	}
}

// widen doubles the ring.
func (t *table) widen() {
	more := make([]entry, max(2*len(t.ring), 16))
	for i := range uint(t.n) {
		more[(t.newest-i)&uint(len(more)-1)] = t.ring[(t.newest-i)&uint(len(t.ring)-1)]
	}
	t.ring = more
}

// pack makes room in the arena for n bytes more: twice what is used, so that it
// seldom comes to this.
func (t *table) pack(n int) {
	live := t.arena
	if t.n > 0 {
		live = t.arena[t.oldest().at:]
	}
	gone := uint32(len(t.arena) - len(live))
	if need := 2 * (len(live) + n); need > cap(t.arena) {
		t.arena = append(make([]byte, 0, 1<<bits.Len(uint(need-1))), live...)
	} else {
		t.arena = t.arena[:copy(t.arena[:cap(t.arena)], live)]
	}
	for i := range uint(t.n) {
		e := &t.ring[(t.newest-i)&uint(len(t.ring)-1)]
		e.at -= gone
		e.end -= gone
	}
}

// static is the static table (RFC 7541 appendix A); its first field has index 1.
var static = func() (out [62]field) {
	for i, f := range [...][2]string{
		{":authority"}, {":method", "GET"}, {":method", "POST"}, {":path", "/"}, {":path", "/index.html"},
		{":scheme", "http"}, {":scheme", "https"},
		{":status", "200"}, {":status", "204"}, {":status", "206"}, {":status", "304"}, {":status", "400"}, {":status", "404"}, {":status", "500"},
		{"accept-charset"}, {"accept-encoding", "gzip, deflate"}, {"accept-language"}, {"accept-ranges"}, {"accept"},
		{"access-control-allow-origin"}, {"age"}, {"allow"}, {"authorization"}, {"cache-control"},
		{"content-disposition"}, {"content-encoding"}, {"content-language"}, {"content-length"},
		{"content-location"}, {"content-range"}, {"content-type"}, {"cookie"}, {"date"}, {"etag"},
		{"expect"}, {"expires"}, {"from"}, {"host"}, {"if-match"}, {"if-modified-since"},
		{"if-none-match"}, {"if-range"}, {"if-unmodified-since"}, {"last-modified"}, {"link"},
		{"location"}, {"max-forwards"}, {"proxy-authenticate"}, {"proxy-authorization"}, {"range"},
		{"referer"}, {"refresh"}, {"retry-after"}, {"server"}, {"set-cookie"},
		{"strict-transport-security"}, {"transfer-encoding"}, {"user-agent"}, {"vary"}, {"via"},
		{"www-authenticate"},
	} {
		out[i+1] = field{[]byte(f[0] + ": " + f[1] + "\r\n"), len(f[0]), classOf([]byte(f[0])), false}
	}
	return out
}()
