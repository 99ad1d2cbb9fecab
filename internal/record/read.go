package record

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"

	"sallyport/internal/socket"
)

// The alerts that are sent, and those received that end nothing (RFC 8446
// section 6).
const (
	alertCloseNotify       = 0
	alertUnexpectedMessage = 10
	alertBadRecordMAC      = 20
	alertRecordOverflow    = 22
	alertIllegalParameter  = 47
	alertDecodeError       = 50
	alertProtocolVersion   = 70
	alertInternalError     = 80
	alertUserCanceled      = 90
)

// The handshake messages that may come after the handshake.
const (
	newSessionTicket = 4
	keyUpdate        = 24
)

const (
	// maxUseless bounds the records in a row that carry nothing.
	maxUseless = 16
	// maxTickets bounds the sessions that a server offers to resume.
	maxTickets = 64
	// maxTicket bounds the size of one: a nonce, a ticket and extensions.
	maxTicket = 13 + 1<<8 + 2<<16
	// updatesBurst and updatesRate bound how often a peer changes its keys,
	// which costs us more than it. An honest one does after some gigabytes.
	updatesBurst = 32
	updatesRate  = 1 // per second
	// askAfter is how many records a peer may send with the same keys until it
	// is asked for new ones.
	askAfter = 1 << 24
)

// Read decrypts into p all records that have come and have room there. It waits
// only for the first. The end is io.EOF only if the peer has said so.
func (c *Conn) Read(p []byte) (n int, err error) {
	if len(p) == 0 {
		return 0, nil
	}
	c.rmu.Lock()
	defer c.rmu.Unlock()
	in := &c.in
	for {
		if in.p < in.q {
			k := copy(p[n:], in.buf.Bytes[in.p:in.q])
			in.p += k
			n += k
		}
		if n == len(p) || in.err != nil {
			break
		}
		if size := c.whole(); size > 0 {
			if n > 0 && size-overhead > len(p)-n {
				break // it is decrypted to where it fits, next time
			}
			n += c.open(p[n:], size)
			continue
		}
		if n > 0 || in.err != nil {
			break
		}
		if err := c.fill(); err != nil {
			return 0, err
		}
	}
	if in.p == in.q && (in.r == in.w || in.err != nil) {
		in.drop()
	}
	if n > 0 {
		return n, nil
	}
	return 0, in.err
}

// Await waits until a record has come, or the end. While it waits it holds no
// buffer, unless a part of a record is in it.
func (c *Conn) Await() (err error) {
	c.rmu.Lock()
	for in := &c.in; err == nil && in.p == in.q && in.err == nil && c.whole() == 0 && in.err == nil; {
		err = c.fill()
	}
	c.rmu.Unlock()
	return err
}

// Buffered is the number of bytes that have come and were not read, records as
// large as they came.
func (c *Conn) Buffered() int {
	c.rmu.Lock()
	defer c.rmu.Unlock()
	return c.in.q - c.in.p + c.in.w - c.in.r
}

// whole is the size of the next record, if all of it is there; else 0. It fails
// the connection on a header that none of ours may have.
func (c *Conn) whole() int {
	in := &c.in
	if in.w-in.r < headerSize {
		return 0
	}
	h := in.buf.Bytes[in.r : in.r+headerSize]
	size := int(h[3])<<8 | int(h[4])
	switch {
	case h[0] != typeData:
		c.fail(alertUnexpectedMessage)
		return 0
	case h[1] != 3 || h[2] != 3:
		c.fail(alertProtocolVersion)
		return 0
	case size > maxCipher:
		c.fail(alertRecordOverflow)
		return 0
	case size < 1+tagSize:
		c.fail(alertBadRecordMAC) // there is no room for a type
		return 0
	}
	if in.w-in.r < headerSize+size {
		return 0
	}
	return headerSize + size
}

// open decrypts the next record, of this size with its header: into p if all of
// it has room there, else where it is. It says how much of p is data.
func (c *Conn) open(p []byte, size int) int {
	in := &c.in
	rec := in.buf.Bytes[in.r : in.r+size]
	body := rec[headerSize:]
	at := in.r + headerSize
	dst := body[:0]
	direct := len(body)-tagSize <= len(p)
	if direct {
		dst = p[:0]
	}
	in.r += size
	nonce, err := in.number()
	if err == nil {
		err = in.wake(c.suite)
	}
	if err != nil {
		c.fail(alertInternalError)
		return 0
	}
	if in.seq%askAfter == 0 {
		c.ask.Store(true)
	}
	text, err := in.aead.Open(dst, nonce, body, rec[:headerSize])
	if err != nil {
		c.fail(alertBadRecordMAC)
		return 0
	}
	n := len(text) - 1
	for n >= 0 && text[n] == 0 {
		n-- // padding
	}
	if n < 0 {
		c.fail(alertUnexpectedMessage)
		return 0
	}
	if text[n] != typeData {
		c.control(text[n], text[:n])
		return 0
	}
	switch {
	case in.have > 0 || in.skip > 0:
		c.fail(alertUnexpectedMessage) // inside of a handshake message
	case n == 0:
		c.nothing()
	case direct:
		in.useless = 0
		return n
	default:
		in.useless = 0
		in.p, in.q = at, at+n
	}
	return 0
}

// nothing takes note of a record without data.
func (c *Conn) nothing() {
	if c.in.useless++; c.in.useless > maxUseless {
		c.fail(alertUnexpectedMessage)
	}
}

// control takes in a record other than of data.
func (c *Conn) control(typ byte, b []byte) {
	c.nothing()
	switch {
	case c.in.err != nil:
	case typ == typeHandshake && len(b) > 0:
		c.handshake(b)
	case typ == typeAlert && c.in.have == 0 && c.in.skip == 0:
		c.alert(b)
	default:
		c.fail(alertUnexpectedMessage)
	}
}

func (c *Conn) alert(b []byte) {
	switch {
	case len(b) != 2:
		c.fail(alertDecodeError)
	case b[1] == alertCloseNotify:
		c.in.err = io.EOF
	case b[1] == alertUserCanceled: // a farewell follows
	default:
		c.dead.Store(true)
		c.in.err = &net.OpError{Op: "remote error", Err: tls.AlertError(b[1])}
	}
}

// handshake takes in a piece of handshake messages.
func (c *Conn) handshake(b []byte) {
	in := &c.in
	for len(b) > 0 && in.err == nil {
		if in.skip > 0 {
			k := min(in.skip, len(b))
			in.skip -= k
			b = b[k:]
			continue
		}
		if in.have < len(in.head) {
			k := copy(in.head[in.have:], b)
			in.have += k
			if b = b[k:]; in.have < len(in.head) {
				return
			}
		}
		size := int(in.head[1])<<16 | int(in.head[2])<<8 | int(in.head[3])
		switch in.head[0] {
		case newSessionTicket:
			c.ticket(size)
		case keyUpdate:
			if size != 1 {
				c.fail(alertDecodeError)
			} else if len(b) > 0 {
				c.update(b)
				return
			}
		default:
			c.fail(alertUnexpectedMessage)
		}
	}
}

// ticket has a ticket passed over, since sessions are not resumed.
func (c *Conn) ticket(size int) {
	in := &c.in
	in.tickets++
	switch {
	case !in.client || in.tickets > maxTickets:
		c.fail(alertUnexpectedMessage)
	case size == 0 || size > maxTicket:
		c.fail(alertDecodeError)
	default:
		in.have, in.skip = 0, size
	}
}

// update changes the keys that we read by. b is the rest of the record: nothing
// may follow that was sent before the change.
func (c *Conn) update(b []byte) {
	in := &c.in
	in.have = 0
	switch {
	case len(b) > 1:
		c.fail(alertUnexpectedMessage)
	case b[0] > 1:
		c.fail(alertIllegalParameter)
	case !in.updates.Spend():
		c.fail(alertUnexpectedMessage)
	case in.next(c.suite) != nil:
		c.fail(alertInternalError)
	case b[0] == 1:
		c.rekey.Store(true) // before the next data, says RFC 8446 section 4.6.3
	}
}

// fail ends the connection and tells the peer why, if nobody is writing just
// now.
func (c *Conn) fail(alert uint8) {
	c.in.err = &net.OpError{Op: "local error", Err: tls.AlertError(alert)}
	if c.wmu.TryLock() {
		c.lastWord(alert)
		c.wmu.Unlock()
	}
	c.dead.Store(true)
}

// fill waits for bytes and takes what has come.
func (c *Conn) fill() error {
	in := &c.in
	if in.err != nil {
		return in.err
	}
	var n int
	var err error
	if c.late != nil {
		n, err = c.late.ReadLate((*lender)(c))
	} else {
		n, err = c.nc.Read((*lender)(c).Lend())
	}
	if n > 0 {
		in.large = n == len(in.buf.Bytes)-in.w || in.large && n > socket.Small
		in.w += n
		return nil
	}
	(*lender)(c).Back()
	switch {
	case err == nil:
		err = io.ErrNoProgress
	case err == io.EOF:
		err = io.ErrUnexpectedEOF // only an alert is the end
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		in.err = err
		in.drop()
	}
	return err
}

// A lender is a Conn that is about to read.
type lender Conn

// Lend gives room behind what is there, for a whole record at least.
func (l *lender) Lend() []byte {
	in := &l.in
	if in.buf == nil {
		in.buf = socket.Get(in.large)
		in.r, in.w = 0, 0
	} else {
		in.settle(in.large)
	}
	in.p, in.q = 0, 0
	return in.buf.Bytes[in.w:]
}

// Back takes back what was lent: part of a record is kept in a small buffer.
func (l *lender) Back() {
	in := &l.in
	if in.buf == nil {
		return
	}
	if in.r == in.w {
		in.drop()
		return
	}
	in.settle(false)
}

// settle moves part of a record to the front of a buffer, a large one if it may.
func (in *reader) settle(large bool) {
	from := in.buf.Bytes[in.r:in.w]
	if old := in.buf; old.Large() != large {
		in.buf = socket.Get(large)
		in.w = copy(in.buf.Bytes, from)
		old.Put()
	} else {
		in.w = copy(in.buf.Bytes, from)
	}
	in.r = 0
}

// drop gives the buffer back, with what is in it.
func (in *reader) drop() {
	in.buf = in.buf.Put()
	in.p, in.q, in.r, in.w = 0, 0, 0, 0
}
