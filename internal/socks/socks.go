// Package socks reads what a client of SOCKS 5 (RFC 1928) asks for, and writes
// the reply. It offers no authentication: who may ask is for its caller to know.
// It dials nothing and reads no byte beyond a request.
package socks

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strconv"
)

// version is the first byte that a client sends.
const version = 5

// A Command is what a client wants done.
type Command byte

// The commands of RFC 1928.
const (
	Connect   Command = 1
	Bind      Command = 2
	Associate Command = 3
)

func (c Command) String() string {
	switch c {
	case Connect:
		return "CONNECT"
	case Bind:
		return "BIND"
	case Associate:
		return "UDP ASSOCIATE"
	}
	return "command " + strconv.Itoa(int(c))
}

// A Reply says what became of a request.
type Reply byte

// The replies of RFC 1928 that are given here.
const (
	Granted     Reply = 0
	Failed      Reply = 1
	Forbidden   Reply = 2
	Unreachable Reply = 4
	Expired     Reply = 6
	NoCommand   Reply = 7
	NoAddress   Reply = 8
)

// Append appends the reply as it is sent. It tells no address: what a tunnel is
// bound to here says nothing to a client.
func (r Reply) Append(b []byte) []byte {
	return append(b, version, byte(r), 0, atypV4, 0, 0, 0, 0, 0, 0)
}

// A Request is what a client asks for.
type Request struct {
	Command Command
	// Authority is host:port, the host as the client wrote it; brackets stand
	// around an IPv6 address.
	Authority string
}

// An Error is a request that cannot be understood. Reply is to be sent, unless
// it is Granted: then the client expects none.
type Error struct {
	Reply Reply
	Text  string
}

func (e *Error) Error() string { return "socks: " + e.Text }

// The types of addresses.
const (
	atypV4   = 1
	atypName = 3
	atypV6   = 4
)

// noMethod is the answer to a client that knows no method that is offered.
const noMethod = 0xff

// Accept agrees with a client on no authentication and reads its request. The
// error is an *Error, or that of rw.
func Accept(rw io.ReadWriter) (Request, error) {
	var b [256]byte
	if _, err := io.ReadFull(rw, b[:2]); err != nil {
		return Request{}, err
	}
	if b[0] != version {
		return Request{}, &Error{Text: fmt.Sprintf("version %d, not 5", b[0])}
	}
	methods := b[:b[1]]
	if _, err := io.ReadFull(rw, methods); err != nil {
		return Request{}, whole(err)
	}
	answer := byte(noMethod)
	for _, m := range methods {
		if m == 0 {
			answer = 0
		}
	}
	if _, err := rw.Write([]byte{version, answer}); err != nil {
		return Request{}, err
	}
	if answer == noMethod {
		return Request{}, &Error{Text: "the client does not offer to go without authentication"}
	}
	return readRequest(rw)
}

func readRequest(r io.Reader) (req Request, err error) {
	var b [256]byte
	if _, err := io.ReadFull(r, b[:4]); err != nil {
		return req, whole(err)
	}
	if b[0] != version || b[2] != 0 {
		return req, &Error{Failed, fmt.Sprintf("the request begins with %x", b[:3])}
	}
	req.Command = Command(b[1])
	atyp, n := b[3], 0
	switch atyp {
	case atypV4:
		n = 4
	case atypV6:
		n = 16
	case atypName:
		if _, err := io.ReadFull(r, b[:1]); err != nil {
			return req, whole(err)
		}
		n = int(b[0])
	default:
		return req, &Error{NoAddress, fmt.Sprintf("address type %d", atyp)}
	}
	var port [2]byte
	for _, p := range [][]byte{b[:n], port[:]} {
		if _, err := io.ReadFull(r, p); err != nil {
			return req, whole(err)
		}
	}
	at := binary.BigEndian.Uint16(port[:])
	if atyp != atypName {
		a, _ := netip.AddrFromSlice(b[:n])
		req.Authority = netip.AddrPortFrom(a, at).String()
		return req, nil
	}
	if !isName(b[:n]) {
		return req, &Error{Failed, fmt.Sprintf("the name %.64q is none of a host", b[:n])}
	}
	req.Authority = string(b[:n]) + ":" + strconv.Itoa(int(at))
	return req, nil
}

// isName says that b cannot be taken for anything but the name of a host.
func isName(b []byte) bool {
	for _, c := range b {
		if (c|0x20 < 'a' || c|0x20 > 'z') && (c < '0' || c > '9') && c != '-' && c != '.' && c != '_' {
			return false
		}
	}
	return len(b) > 0
}

// whole makes of the end of the connection one in the middle of a request.
func whole(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
