package meshtest

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
)

// backlog is how many dialled connections wait for Accept; the next is refused.
const backlog = 128

// A Network is a loopback in memory: listeners have addresses, and dialling
// reaches them. The zero Network is ready.
type Network struct {
	mu        sync.Mutex // guards the fields below
	listeners map[netip.AddrPort]*listener
	port      uint16
}

// Listen takes an address such as "10.0.0.1:15006". Port 0 takes a free one.
func (n *Network) Listen(address string) (net.Listener, error) {
	a, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, fmt.Errorf("listen %s: %w", address, err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if a.Port() == 0 {
		a = netip.AddrPortFrom(a.Addr(), n.ephemeral())
	}
	if n.listeners[a] != nil {
		return nil, opError("listen", a, os.NewSyscallError("bind", syscall.EADDRINUSE))
	}
	if n.listeners == nil {
		n.listeners = make(map[netip.AddrPort]*listener)
	}
	l := &listener{network: n, address: a, conns: make(chan net.Conn, backlog), closed: make(chan struct{})}
	n.listeners[a] = l
	return l, nil
}

// DialContext connects to a listener; where none is, the connection is
// refused. Its signature is that of net.Dialer.
func (n *Network) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	a, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, fmt.Errorf("dial %s %s: %w", network, address, err)
	}
	if err := ctx.Err(); err != nil {
		return nil, opError("dial", a, err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if l := n.listeners[a]; l != nil {
		here, there := pipe(netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), n.ephemeral()), a)
		select {
		case l.conns <- there:
			return here, nil
		default:
		}
	}
	return nil, opError("dial", a, os.NewSyscallError("connect", syscall.ECONNREFUSED))
}

// ephemeral returns a port no listener was given. mu is held.
func (n *Network) ephemeral() uint16 {
	if n.port < 32768 {
		n.port = 32768
	}
	n.port++
	return n.port
}

type listener struct {
	network *Network
	address netip.AddrPort
	conns   chan net.Conn
	once    sync.Once
	closed  chan struct{}
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case <-l.closed:
		return nil, opError("accept", l.address, net.ErrClosed)
	default:
	}
	select {
	case <-l.closed:
		return nil, opError("accept", l.address, net.ErrClosed)
	case c := <-l.conns:
		return c, nil
	}
}

// Close also closes what was dialled and not accepted.
func (l *listener) Close() error {
	err := opError("close", l.address, net.ErrClosed)
	l.once.Do(func() {
		l.network.mu.Lock()
		delete(l.network.listeners, l.address)
		l.network.mu.Unlock()
		close(l.closed)
		err = nil
	})
	for {
		select {
		case c := <-l.conns:
			c.Close()
		default:
			return err
		}
	}
}

func (l *listener) Addr() net.Addr { return net.TCPAddrFromAddrPort(l.address) }

func opError(op string, a netip.AddrPort, err error) error {
	return &net.OpError{Op: op, Net: "tcp", Addr: net.TCPAddrFromAddrPort(a), Err: err}
}
