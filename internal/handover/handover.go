// Package handover lets a new process of a proxy take over from the one that
// runs: the new one gets the listening sockets and takes all new connections,
// the old one finishes what it carries and keeps what only one process may have
// (the audit log, the tie to the issuer) until it ends. The sockets that a
// service manager has opened come in by the same doors.
//
// Both speak over a Unix socket of mode 0600 in a directory of mode 0700, and
// each demands that the other runs as its own user: who may speak here could
// read the keys as well. Nothing is given up before the new process serves, and
// when it dies before the old one has ended, that one serves on. A Keeper owns a
// goroutine for each connection, a Tie owns one; both end with their connection.
package handover

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"sallyport/internal/audit"
	"sallyport/internal/capture"
)

// Socket is the name of the socket in the run directory.
const Socket = "handover.sock"

// version is that of the wire; both must have the same.
const version = 1

const (
	// helloWithin bounds the first exchange.
	helloWithin = 5 * time.Second
	// answerWithin is how long a record may wait for its answer. Who is stuck for
	// longer is taken for gone; the lock of the log says if that is true.
	answerWithin = 10 * time.Second
	// partWithin is how long the last words may take.
	partWithin = 5 * time.Second
	// AdoptWithin is how long a new process waits for the lock of the log once the
	// old one has gone. One that only lost the connection never lets go of it.
	AdoptWithin = 15 * time.Second
	maxMessage  = 1 << 20
	// maxDoors is less than what one message of the kernel may carry.
	maxDoors = 128
)

// What a message asks or says.
const (
	opHello  = "hello"  // who takes over
	opDoors  = "doors"  // the answer, with the sockets
	opAppend = "append" // a record for the audit log
	opSync   = "sync"
	opReady  = "ready" // the new process serves
	opStop   = "stop"  // the new process was asked to stop
	opAnswer = "answer"
	opPart   = "part"   // the old process is about to end
	opParted = "parted" // the new process will send no more records
)

// A message is one step of either process.
type message struct {
	Op      string        `json:"op"`
	Version int           `json:"version,omitempty"`
	Program string        `json:"program,omitempty"`
	DataDir string        `json:"data_dir,omitempty"`
	Doors   []name        `json:"doors,omitempty"`
	Record  *audit.Record `json:"record,omitempty"`
	Seq     uint64        `json:"seq,omitempty"`
	Err     string        `json:"err,omitempty"`
}

// A name says what a socket is: the setting that it belongs to, and the address
// that stands there.
type name struct {
	Setting string `json:"setting"`
	Address string `json:"address"`
}

func (m message) encode() ([]byte, error) {
	text, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	if len(text) > maxMessage {
		return nil, fmt.Errorf("a message of %d bytes is too long", len(text))
	}
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(text))), text...), nil
}

func write(w io.Writer, m message) error {
	b, err := m.encode()
	if err != nil {
		return err
	}
	_, err = w.Write(b)
	return err
}

func read(r io.Reader) (m message, err error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return m, err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n > maxMessage {
		return m, fmt.Errorf("a message of %d bytes is too long", n)
	}
	// Memory grows with what arrives, not with what is announced.
	text, err := io.ReadAll(io.LimitReader(r, int64(n)))
	if err == nil && len(text) < int(n) {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return m, err
	}
	if err := json.Unmarshal(text, &m); err != nil {
		return message{}, fmt.Errorf("read message: %w", err)
	}
	return m, nil
}

// ownUser refuses a peer that runs as another user.
func ownUser(c *net.UnixConn) (pid int, err error) {
	cred, err := capture.PeerCred(c)
	if err != nil {
		return 0, err
	}
	if int(cred.UID) != os.Geteuid() {
		return 0, fmt.Errorf("pid %d runs as uid %d, this is uid %d", cred.PID, cred.UID, os.Geteuid())
	}
	return cred.PID, nil
}

// isDoor looks at a socket that the process before has sent.
func isDoor(fd int) error {
	if n, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL); err != nil || n != unix.IPPROTO_UDP {
		return listens(fd)
	}
	at, err := unix.Getsockname(fd)
	if err != nil {
		return err
	}
	switch at := at.(type) {
	case *unix.SockaddrInet4:
		if at.Port != 0 {
			return nil
		}
	case *unix.SockaddrInet6:
		if at.Port != 0 {
			return nil
		}
	}
	return errors.New("it has no port")
}

// listens looks at a socket that somebody has sent: it must be what a listener
// was.
func listens(fd int) error {
	for _, o := range []struct {
		opt  int
		want []int
		what string
	}{
		{unix.SO_ACCEPTCONN, []int{1}, "does not listen"},
		{unix.SO_TYPE, []int{unix.SOCK_STREAM}, "is no stream socket"},
		{unix.SO_DOMAIN, []int{unix.AF_INET, unix.AF_INET6, unix.AF_UNIX}, "is of another family"},
	} {
		n, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, o.opt)
		if err != nil {
			return fmt.Errorf("it is no socket: %w", err)
		}
		ok := false
		for _, w := range o.want {
			ok = ok || n == w
		}
		if !ok {
			return errors.New("it " + o.what)
		}
	}
	return nil
}
