package leak

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"
)

// hello leads what is sent to a witness: hello, the way, and a nonce, which the
// witness answers after heard.
const (
	hello = "sallyport-leak "
	heard = "sallyport-heard "
)

const witnessIdle = 10 * time.Second

// A Witness stands outside and answers whatever gets there.
type Witness struct {
	// Heard is told of all that came: how, from where, and its first line. It is
	// not called twice at once.
	Heard func(how string, from netip.AddrPort, line string)

	mu sync.Mutex // held around Heard
}

// Serve listens in TCP and UDP until ctx ends.
func (w *Witness) Serve(ctx context.Context, at netip.AddrPort) error {
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "tcp", at.String())
	if err != nil {
		return err
	}
	pc, err := lc.ListenPacket(ctx, "udp", ln.Addr().String())
	if err != nil {
		ln.Close()
		return err
	}
	stop := context.AfterFunc(ctx, func() { ln.Close(); pc.Close() })
	defer stop()
	var wg sync.WaitGroup
	wg.Go(func() { w.packets(pc) })
	for {
		c, err := ln.Accept()
		if errors.Is(err, net.ErrClosed) {
			wg.Wait()
			return nil
		}
		if err != nil {
			time.Sleep(10 * time.Millisecond) // out of descriptors, most likely
			continue
		}
		wg.Go(func() {
			defer c.Close()
			defer context.AfterFunc(ctx, func() { c.Close() })()
			w.stream(c)
		})
	}
}

func (w *Witness) stream(c net.Conn) {
	_ = c.SetDeadline(time.Now().Add(witnessIdle))
	from := c.RemoteAddr().(*net.TCPAddr).AddrPort()
	w.told("tcp", from, "") // that it came is a leak already
	line, err := bufio.NewReaderSize(c, 1<<10).ReadSlice('\n')
	if err != nil {
		return
	}
	w.told("tcp", from, string(line))
	if strings.HasPrefix(string(line), hello) {
		fmt.Fprint(c, answer(string(line)))
	}
}

func (w *Witness) packets(pc net.PacketConn) {
	b := make([]byte, 1<<10)
	for {
		n, from, err := pc.ReadFrom(b)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue
		}
		w.told("udp", from.(*net.UDPAddr).AddrPort(), string(b[:n]))
		if !strings.HasPrefix(string(b[:n]), hello) {
			continue // another witness, perhaps, which would answer in turn
		}
		_, _ = pc.WriteTo([]byte(answer(string(b[:n]))), from) // it has been heard all the same
	}
}

func (w *Witness) told(how string, from netip.AddrPort, line string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.Heard(how, from, strings.TrimSpace(line))
}

func answer(line string) string {
	return heard + strings.TrimPrefix(strings.TrimSpace(line), hello) + "\n"
}
