package http2

import (
	"bytes"
	"cmp"
	"errors"
	"os"
)

// errUnclear ends a lane on which something is written that is not HTTP/1.1 as
// package http1 writes it.
var errUnclear = errors.New("what is written is no HTTP/1.1")

// outgoing is where who writes stands within a message.
type outgoing struct {
	state  uint8
	left   int64  // of the body, or of its chunk
	line   []byte // of a chunk, or of trailers, that is not whole yet
	block  []byte // the field section that was made last, by one of the next
	heads  recollection
	tails  recollection
	tunnel bool   // bytes pass as they are
	head   bool   // the answer to HEAD has no body
	asked  uint8  // what the call asked for beside
	turned int    // the status that was sent instead of the one that was written
	proof  []byte // of a client: what answers its key, for a WebSocket
}

// restart makes ready for another call.
func (o *outgoing) restart() {
	o.state, o.left, o.line = outHead, 0, o.line[:0]
	o.tunnel, o.head, o.asked, o.turned = false, false, 0, 0
}

// What a call can ask for beside an answer.
const (
	askedConnect   = 1 // a tunnel
	askedWebSocket = 2
)

// The states of outgoing.
const (
	outHead uint8 = iota
	outLength
	outSize     // of a chunk
	outChunk    // its data
	outChunkEnd // the CRLF behind it
	outTrailer
	outTunnel
)

// Write takes in HTTP/1.1, at a server an answer, at a client a request, and sees
// that it is sent. A head is written whole. Write waits while the peer lets
// nothing more be sent.
func (l *Lane) Write(p []byte) (n int, err error) {
	c := l.c
	head, body := 0, bodyNone
	if l.out.state == outHead && len(p) > 0 {
		if head, body, err = l.encode(p); err != nil {
			return 0, err
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for n < len(p) && err == nil {
		k := 0
		switch l.out.state {
		case outHead:
			if head == 0 { // it is not the first
				head, body, err = l.encode(p[n:])
			}
			if err == nil {
				err = l.writeHead(body)
			}
			if err == nil {
				k, head = head, 0
			}
		case outLength, outTunnel:
			k, err = l.writeData(p[n:])
		default:
			k, err = l.writeChunks(p[n:])
		}
		n += k
	}
	if !c.out.flushing && len(c.out.pend) > 0 && c.err == nil {
		c.flush()
	}
	return n, err
}

var crlf2 = []byte("\r\n\r\n")

// encode makes a field section of a head. n is how long that is.
func (l *Lane) encode(p []byte) (n int, body framing, err error) {
	if l.c.server {
		return l.out.answer(p)
	}
	return l.out.request(p, l.c.secure, l.c.extended.Load())
}

// writeHead sends the field section that was made last. The lock of c is held.
func (l *Lane) writeHead(body framing) error {
	err := l.headable()
	if err == nil && !l.c.server {
		err = l.ask()
	}
	if err == nil {
		err = l.may()
	}
	if err != nil {
		return err
	}
	l.queueHead(body == bodyNone)
	switch body {
	case bodyNone:
		l.finished()
	case bodyLength:
		l.out.state = outLength
	case bodyChunks:
		l.out.state = outSize
	case bodyTunnel:
		l.out.state, l.out.tunnel = outTunnel, true
		if l.c.server {
			l.opened()
		}
	}
	return nil
}

// framing is what follows a head.
type framing uint8

const (
	bodyNone   framing = iota
	bodyLater          // it was an interim answer
	bodyLength         // outgoing.left bytes
	bodyChunks
	bodyTunnel
)

// may says why nothing may be sent. The lock of c is held.
func (l *Lane) may() error {
	switch {
	case l.werr != nil:
		return l.werr
	case l.id == 0:
		return errNoCall
	case l.sent:
		return errEnded
	}
	return nil
}

// writeData sends some of a body of known length, or of a tunnel. The lock of c
// is held.
func (l *Lane) writeData(p []byte) (int, error) {
	o := &l.out
	if o.state == outLength {
		p = p[:min(int64(len(p)), o.left)]
	}
	k, err := l.sendable(len(p))
	if err != nil {
		return 0, err
	}
	if o.state == outLength {
		if o.left -= int64(k); o.left == 0 {
			l.finish(p[:k])
			return k, nil
		}
	}
	l.queue(p[:k], 0)
	return k, nil
}

// maxLine bounds a line that is made of pieces: the size of a chunk, or trailers.
const maxLine = 64 << 10

// writeChunks sends some of a body in chunks, without their sizes. The lock of c
// is held.
func (l *Lane) writeChunks(p []byte) (int, error) {
	o := &l.out
	switch o.state {
	case outChunk:
		k, err := l.sendable(int(min(int64(len(p)), o.left)))
		if err != nil {
			return 0, err
		}
		if o.left -= int64(k); o.left > 0 {
			l.queue(p[:k], 0)
			return k, nil
		}
		if rest, last := bytes.CutPrefix(p[k:], lastChunk); last {
			l.finish(p[:k])
			return len(p) - len(rest), nil
		}
		l.queue(p[:k], 0)
		o.state = outChunkEnd
		return k, nil
	case outTrailer:
		return l.writeTrailer(p)
	}
	// A line, which has mostly come whole.
	i := bytes.IndexByte(p, '\n')
	if i < 0 {
		if o.line = append(o.line, p...); len(o.line) > maxLine {
			return 0, errUnclear
		}
		return len(p), nil
	}
	line := p[:i+1]
	if len(o.line) > 0 {
		o.line = append(o.line, line...)
		line = o.line
	}
	line, ok := bytes.CutSuffix(line, []byte("\r\n"))
	o.line = o.line[:0]
	if !ok {
		return 0, errUnclear
	}
	if o.state == outChunkEnd {
		if o.state = outSize; len(line) > 0 {
			return 0, errUnclear
		}
		return i + 1, nil
	}
	if o.left, ok = parseHex(line); !ok {
		return 0, errUnclear
	}
	if o.state = outChunk; o.left == 0 {
		o.state = outTrailer
	}
	return i + 1, nil
}

// lastChunk is what ends a body without trailers, behind the data of its last
// chunk.
var lastChunk = []byte("\r\n0\r\n\r\n")

// writeTrailer ends a body in chunks.
func (l *Lane) writeTrailer(p []byte) (int, error) {
	o := &l.out
	was := len(o.line)
	if o.line = append(o.line, p...); len(o.line) > maxLine {
		return 0, errUnclear
	}
	if !bytes.HasPrefix(o.line, crlf2[:2]) && !bytes.Contains(o.line, crlf2) {
		return len(p), nil
	}
	o.tails.begin()
	n, _, err := o.tails.fields(o.line)
	if err != nil {
		return 0, err
	}
	o.line, o.block = o.line[:0], o.tails.block
	if err := cmp.Or(l.headable(), l.may()); err != nil {
		return 0, err
	}
	if len(o.block) == 0 {
		l.finish(nil)
	} else {
		l.queueHead(true)
		l.finished()
	}
	return n - was, nil
}

func parseHex(b []byte) (n int64, ok bool) {
	for _, c := range b {
		switch {
		case '0' <= c && c <= '9':
			n = n<<4 | int64(c-'0')
		case 'a' <= c && c <= 'f':
			n = n<<4 | int64(c-'a'+10)
		default:
			return 0, false
		}
	}
	return n, 0 < len(b) && len(b) < 16
}

// queueHead appends the field section that was made last to what is pending.
func (l *Lane) queueHead(end bool) {
	o := &l.c.out
	if l.queued == 0 {
		o.batch = append(o.batch, l)
	}
	block := l.out.block
	if !l.c.tableless {
		// A peer that has made the table smaller than it was waits for this.
		l.c.tableless = true
		block = append([]byte{noTable}, block...)
	}
	l.queued += len(block)
	o.pend = appendHeaders(o.pend, l.id, end, block)
}

// headable waits until a field section can be queued. It needs no credit, and it
// goes whole; but it waits in line like data, or a peer that reads no answer
// could be made more and more of them.
func (l *Lane) headable() error {
	c := l.c
	for {
		if err := l.stopped(); err != nil {
			l.passOn()
			return err
		}
		if l.mayQueue(len(l.out.block)) > l.queued {
			l.turn = false
			return nil
		}
		if !c.out.flushing && len(c.out.pend) > 0 {
			c.flush()
			continue
		}
		l.waits = true
		l.room.Wait()
		l.waits = false
	}
}

// stopped says why who writes need not wait any longer.
func (l *Lane) stopped() error {
	if l.werr == nil && l.wend.Passed {
		return os.ErrDeadlineExceeded
	}
	return l.werr
}

// passOn gives the turn to the next in line.
func (l *Lane) passOn() {
	if l.turn {
		l.turn = false
		l.c.out.turns()
	}
}

// sendable waits until some of n bytes can be queued.
func (l *Lane) sendable(n int) (int, error) {
	c := l.c
	for {
		if err := cmp.Or(l.may(), l.stopped()); err != nil {
			l.passOn()
			return 0, err
		}
		if l.credit > 0 && c.credit > 0 {
			if k := min(n, l.credit, c.credit, maxPayload, l.mayQueue(n)-l.queued); k > 0 {
				l.turn = false
				return k, nil
			}
		} else {
			l.passOn() // a head could go
		}
		if !c.out.flushing && len(c.out.pend) > 0 {
			c.flush()
			continue
		}
		if c.credit <= 0 && !l.thirsts {
			l.thirsts = true
			c.thirsty = append(c.thirsty, l)
		}
		l.waits = true
		l.room.Wait()
		l.waits = false
	}
}

// mayQueue is how much of n bytes the lane may have queued. In a crowd it waits
// for its turn.
func (l *Lane) mayQueue(n int) int {
	o := &l.c.out
	switch {
	case len(o.pend) == 0 && !o.flushing, len(o.pend) < gather && len(o.line) == 0:
		return gather
	case l.turn, n <= tiny && len(o.pend) < packed, len(o.pend) < crowded && len(o.line) == 0:
		return share
	}
	if !l.inLine {
		l.inLine = true
		o.line = append(o.line, l)
	}
	return 0
}

// queue appends a data frame to what is pending.
func (l *Lane) queue(p []byte, flags uint8) {
	c := l.c
	if l.queued == 0 && len(p) > 0 {
		c.out.batch = append(c.out.batch, l)
	}
	l.credit -= len(p)
	c.credit -= len(p)
	l.queued += len(p)
	c.out.earned += 4
	c.out.pend = append(appendHeader(c.out.pend, len(p), kindData, flags, l.id), p...)
}

// finish sends the last data of this end, which may be none.
func (l *Lane) finish(p []byte) {
	l.queue(p, flagEnd)
	l.finished()
}

// finished takes note that this end has sent its last frame of the call. Of a
// request that is not whole by then a server wants no more (RFC 9113 section
// 8.1): its lane ends.
func (l *Lane) finished() {
	c := l.c
	l.sent = true
	l.out.state = outHead
	switch {
	case l.peerEnd:
		c.forget(l)
		if l.out.asked != 0 && c.server && !l.out.tunnel { // nobody may take what was for a tunnel that was refused for a request
			l.spend()
		}
	case c.server && !l.out.tunnel:
		c.reset(l.id, NoError)
		c.forget(l)
		l.spend()
	}
}

// spend has who reads the lane learn that there is no more.
func (l *Lane) spend() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.rerr == nil {
		l.rerr = errSpent
	}
	l.more.Broadcast()
}

// errSpent is read behind a request of which no more is wanted.
var errSpent = errors.New("the call was answered before all of it had come")

// opened lets the bytes of a tunnel be read. The lock of c is held.
func (l *Lane) opened() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.got.held, l.got.raw = false, true
	l.more.Signal()
}
