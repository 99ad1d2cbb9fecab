package record

import (
	"errors"
	"time"

	"sallyport/internal/socket"
)

// maxRecords is how many records are written with the same keys: less than the
// 2^24.5 of full size that AES-GCM is good for (RFC 8446 section 5.5).
const maxRecords = 1 << 24

// errEnded is returned by Write after CloseWrite.
var errEnded = errors.New("connection was ended in this direction")

// errDead is returned by Write when an alert has ended the connection.
var errDead = errors.New("connection was ended by an alert")

// Write sends p: as many records as it takes, up to 128 KiB in one call.
func (c *Conn) Write(p []byte) (int, error) {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	n := 0
	for n < len(p) {
		k, err := c.send(p[n:])
		if n += k; err != nil {
			return n, err
		}
	}
	return n, nil
}

// WriteLent is Write of memory that is the caller's alone: the bytes of p, and one
// behind them that must be within its capacity, change while they are sealed and
// are as they were afterwards. That saves a copy of all that is sent.
func (c *Conn) WriteLent(p []byte) (int, error) {
	if cap(p) == len(p) {
		return c.Write(p)
	}
	c.wmu.Lock()
	defer c.wmu.Unlock()
	n := 0
	for n < len(p) {
		k, err := c.sendLent(p[n:])
		if n += k; err != nil {
			return n, err
		}
	}
	return n, nil
}

// WriteParts sends one thing after the other as if they were one. It changes
// parts, whose memory is the caller's.
func (c *Conn) WriteParts(parts [][]byte) (int, error) {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	n := 0
	for {
		left := 0
		for _, p := range parts {
			left += len(p)
		}
		if left == 0 {
			return n, nil
		}
		k, err := c.sendParts(parts, left)
		if n += k; err != nil {
			return n, err
		}
	}
}

// send sends as much of p as has room in one buffer.
func (c *Conn) send(p []byte) (int, error) {
	one := [1][]byte{p}
	return c.sendParts(one[:], len(p))
}

// sendParts sends as much of the parts as has room in one buffer, and cuts it off
// them. In all they are so long.
func (c *Conn) sendParts(parts [][]byte, left int) (n int, err error) {
	return c.fillAndSend(left, func(out []byte, _, k int) ([]byte, error) {
		head := len(out)
		return c.out.seal(gather(append(out, header[:]...), parts, k), head, typeData)
	})
}

// sendLent is send of memory that is the caller's alone.
func (c *Conn) sendLent(p []byte) (n int, err error) {
	return c.fillAndSend(len(p), func(out []byte, n, k int) ([]byte, error) {
		return c.out.sealFrom(out, p[n:n+k], typeData)
	})
}

// header is that of a record, but for its size.
var header = [headerSize]byte{typeData, 3, 3}

// fillAndSend makes records of as much as has room in one buffer, and sends them.
// add appends a record of the next k bytes, after n.
func (c *Conn) fillAndSend(left int, add func(out []byte, n, k int) ([]byte, error)) (n int, err error) {
	if err := c.writable(); err != nil {
		return 0, err
	}
	buf := socket.Get(left > maxPlain)
	defer buf.Put()
	room := socket.Small
	if buf.Large() {
		room = socket.Large
	}
	out := buf.Bytes[:0]
	if c.rekey.Swap(false) || c.ask.Load() {
		if out, err = c.renew(out); err != nil {
			return 0, c.broken(err)
		}
	}
	for n < left && n < room {
		if c.out.seq >= maxRecords {
			if out, err = c.renew(out); err != nil {
				return 0, c.broken(err)
			}
		}
		k := min(left-n, maxPlain)
		if out, err = add(out, n, k); err != nil {
			return 0, c.broken(err)
		}
		n += k
	}
	if _, err := c.nc.Write(out); err != nil {
		return 0, c.broken(err)
	}
	return n, nil
}

// gather moves k bytes from the parts to the end of out.
func gather(out []byte, parts [][]byte, k int) []byte {
	for i := 0; k > 0; i++ {
		n := min(k, len(parts[i]))
		out = append(out, parts[i][:n]...)
		parts[i] = parts[i][n:]
		k -= n
	}
	return out
}

// seal makes a record of what follows its header at head.
func (k *keys) seal(out []byte, head int, typ byte) ([]byte, error) {
	out = append(out, typ)
	body := out[head+headerSize:]
	size := len(body) + tagSize
	out[head+3], out[head+4] = byte(size>>8), byte(size)
	nonce, err := k.number()
	if err != nil {
		return out, err
	}
	return k.aead.Seal(out[:head+headerSize], nonce, body, out[head:head+headerSize]), nil
}

// sealFrom appends a record of p, behind which the type stands meanwhile.
func (k *keys) sealFrom(out, p []byte, typ byte) ([]byte, error) {
	head := len(out)
	size := len(p) + 1 + tagSize
	out = append(out, typeData, 3, 3, byte(size>>8), byte(size))
	nonce, err := k.number()
	if err != nil {
		return out, err
	}
	p = p[:len(p)+1]
	last := &p[len(p)-1]
	was := *last
	*last = typ
	out = k.aead.Seal(out, nonce, p, out[head:head+headerSize])
	*last = was
	return out, nil
}

// record appends a record of another type than data.
func (c *Conn) record(out []byte, typ byte, b ...byte) ([]byte, error) {
	head := len(out)
	out = append(append(out, header[:]...), b...)
	return c.out.seal(out, head, typ)
}

// renew changes the keys that we write by, and asks the peer to do so if it has
// used its own for long.
func (c *Conn) renew(out []byte) ([]byte, error) {
	ask := byte(0)
	if c.ask.Swap(false) {
		ask = 1
	}
	out, err := c.record(out, typeHandshake, keyUpdate, 0, 0, 1, ask)
	if err != nil {
		return out, err
	}
	return out, c.out.next(c.suite)
}

// writable says whether more may be written, and has the keys for that at hand.
func (c *Conn) writable() error {
	if c.out.err == nil && c.dead.Load() {
		c.out.err = errDead
	}
	if c.out.err == nil {
		c.out.err = c.out.wake(c.suite)
	}
	return c.out.err
}

// broken keeps why nothing more can be written.
func (c *Conn) broken(err error) error {
	c.out.err = err
	return err
}

// CloseWrite tells the peer that nothing more comes. It reads on.
func (c *Conn) CloseWrite() error {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	if err := c.writable(); err != nil {
		return err
	}
	err := c.sayAlert(alertCloseNotify)
	c.out.err = errEnded
	return err
}

// lastWord says an alert after which nothing follows, within its time.
func (c *Conn) lastWord(alert uint8) {
	if c.writable() != nil {
		return
	}
	_ = c.nc.SetWriteDeadline(time.Now().Add(farewell))
	_ = c.sayAlert(alert) // the connection ends, whether the peer hears it or not
	c.out.err = errEnded
}

// sayAlert sends an alert. All that end a connection are fatal.
func (c *Conn) sayAlert(alert uint8) error {
	level := byte(2)
	if alert == alertCloseNotify {
		level = 1
	}
	buf := socket.Get(false)
	defer buf.Put()
	out, err := c.record(buf.Bytes[:0], typeAlert, level, alert)
	if err == nil {
		_, err = c.nc.Write(out)
	}
	return err
}
