package http1

import (
	"crypto/rand"
	"crypto/sha1" //nolint:gosec // RFC 6455 section 1.3 has it prove nothing
	"encoding/base64"
	"encoding/binary"
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"sallyport/internal/socket"
)

// The codes by which a proxy closes a WebSocket (RFC 6455 section 7.4.1).
const (
	CloseGoingAway = 1001
	ClosePolicy    = 1008
)

// WebSocketKey is the key of a request for a WebSocket; nil when the request is not
// what RFC 6455 section 4.2.1 wants: one key of 16 bytes, and version 13.
func (r *Request) WebSocketKey() []byte {
	key := only(r.Fields, "sec-websocket-key")
	var b [18]byte
	if len(key) != 24 || string(only(r.Fields, "sec-websocket-version")) != "13" {
		return nil
	}
	if n, err := base64.StdEncoding.Decode(b[:], key); err != nil || n != 16 {
		return nil
	}
	return key
}

// Answers says whether a 101 is to the request with this key.
func (r *Response) Answers(key []byte) bool {
	return r.Upgrade && len(key) > 0 && string(only(r.Fields, "sec-websocket-accept")) == string(AppendWebSocketProof(nil, key))
}

// AppendWebSocketProof appends what answers the key of a request for a WebSocket
// (RFC 6455 section 4.2.2).
func AppendWebSocketProof(b, key []byte) []byte {
	h := sha1.New() //nolint:gosec // see above
	h.Write(key)
	h.Write([]byte("258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	return base64.StdEncoding.AppendEncode(b, h.Sum(nil))
}

// only is the value of a field that stands once, nil otherwise.
func only(fields []Field, name string) (v []byte) {
	n := 0
	for i := range fields {
		if equalFoldLen(fields[i].Name, name) {
			v = fields[i].Value
			n++
		}
	}
	if n != 1 {
		return nil
	}
	return v
}

// parting is how a tunnel of WebSockets ends from outside.
type parting struct {
	code  atomic.Uint32 // why; not 0 once it is to end
	until atomic.Int64  // when it must have, Unix nanoseconds
	heard atomic.Int32  // the directions that have heard it
	look  sync.Mutex    // held while Part touches the ends, which are Run's
}

// Part ends a tunnel in which WebSockets speak: nothing more is carried, both
// ends are sent a Close frame with the code if what they got so far ends where a
// frame does, and may answer it. It returns when both have closed, and after
// within at the latest; whoever calls it closes the connections then. In other
// tunnels it does nothing. It may be called from any goroutine.
func (t *Tunnel) Part(code uint16, within time.Duration) {
	if !t.WebSocket {
		return
	}
	t.parts.until.CompareAndSwap(0, time.Now().Add(within).UnixNano())
	t.parts.code.CompareAndSwap(0, uint32(code))
	end := time.NewTimer(within)
	defer end.Stop()
	again := time.NewTicker(5 * time.Millisecond)
	defer again.Stop()
	for {
		t.interrupt()
		select {
		case <-t.done:
			return
		case <-end.C:
			return
		case <-again.C:
		}
	}
}

// interrupt has both directions look up from what they read, unless they have
// heard already or Run is over.
func (t *Tunnel) interrupt() {
	t.parts.look.Lock()
	defer t.parts.look.Unlock()
	select {
	case <-t.done: // the ends may be lent to another call by now
		return
	default:
	}
	if t.parts.heard.Load() < 2 {
		// Again and again, since each direction sets deadlines of its own.
		_ = t.Client.nc.SetReadDeadline(time.Unix(1, 0))
		_ = t.Server.nc.SetReadDeadline(time.Unix(1, 0))
	}
}

// farewell ends one direction: it says why to dst, and waits until src has
// closed, since to close on bytes that were not read could destroy what src is
// sent by the other direction. A dst that is gone ends this direction alone: what
// the other one has to say to src does not hang on it.
func (t *Tunnel) farewell(dst, src *Conn, f *frames, from *socket.Source) {
	until := time.Unix(0, t.parts.until.Load())
	t.parts.heard.Add(1)
	if f.between() {
		_ = dst.writeUntil(until)
		if _, err := dst.nc.Write(closeFrame(uint16(t.parts.code.Load()), f.masked)); err != nil {
			t.once.Do(func() { t.err = err })
			dst.Close() // which the other direction, reading from it, is told by
		}
	}
	_ = dst.closeWrite() // one that cannot half close, or is closed, has read the Close frame
	for time.Now().Before(until) {
		_ = src.nc.SetReadDeadline(until)
		if _, err := from.Next(); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return
		}
	}
}

// closeText goes with each code: it tells nothing of rules.
var closeText = map[uint16]string{CloseGoingAway: "going away", ClosePolicy: "not allowed any more"}

// closeFrame is a whole Close frame (RFC 6455 sections 5.2 and 5.5.1).
func closeFrame(code uint16, masked bool) []byte {
	body := binary.BigEndian.AppendUint16(nil, code)
	body = append(body, closeText[code]...)
	head := []byte{0x80 | opClose, byte(len(body))}
	if masked {
		head[1] |= maskBit
		var key [4]byte
		_, _ = rand.Read(key[:]) // it never fails
		head = append(head, key[:]...)
		for i := range body {
			body[i] ^= key[i%4]
		}
	}
	return append(head, body...)
}

const (
	opContinue = 0x0
	opText     = 0x1
	opBinary   = 0x2
	opClose    = 0x8
	opPong     = 0xa

	maskBit = 0x80
)

// frames follows the frames of one direction, by their heads alone. The nil
// *frames follows nothing.
type frames struct {
	masked bool // as all frames of this direction must be

	head    [14]byte
	have    int    // bytes of the head that have come
	left    uint64 // bytes of the payload that have not
	partial bool   // a message is in the middle of its frames
	closed  bool   // a Close frame has passed: nothing may come after it
	lost    bool   // what passed was no frame
}

// between says that a frame may be put in here.
func (f *frames) between() bool { return f.have == 0 && f.left == 0 && !f.closed && !f.lost }

// follow takes note of bytes that have passed.
func (f *frames) follow(b []byte) {
	if f == nil || f.lost {
		return
	}
	for len(b) > 0 {
		if f.left > 0 {
			n := min(f.left, uint64(len(b)))
			f.left, b = f.left-n, b[n:]
			continue
		}
		need := 2
		if f.have >= need {
			need = headSize(f.head[1])
		}
		n := copy(f.head[f.have:need], b)
		f.have, b = f.have+n, b[n:]
		if f.have < 2 || f.have < headSize(f.head[1]) {
			continue
		}
		if !f.begin() {
			f.lost = true
			return
		}
	}
}

// headSize is the length of a frame's head by its second byte.
func headSize(b byte) int {
	n := 2
	switch b &^ maskBit {
	case 126:
		n += 2
	case 127:
		n += 8
	}
	if b&maskBit != 0 {
		n += 4
	}
	return n
}

// begin takes a whole head for the frame that it begins; false if it is none
// that may stand here.
func (f *frames) begin() bool {
	last, op := f.head[0]&0x80 != 0, f.head[0]&0x0f
	size := uint64(f.head[1] &^ maskBit)
	switch size {
	case 126:
		size = uint64(binary.BigEndian.Uint16(f.head[2:]))
	case 127:
		size = binary.BigEndian.Uint64(f.head[2:])
	}
	f.have, f.left = 0, size
	switch {
	case f.closed, f.head[1]&maskBit != 0 != f.masked, size > 1<<63-1:
		return false
	case op >= opClose: // a control frame is small, whole, and may come within a message
		f.closed = op == opClose
		return op <= opPong && last && size <= 125
	case op == opContinue != f.partial || op > opBinary:
		return false
	}
	f.partial = !last
	return true
}
