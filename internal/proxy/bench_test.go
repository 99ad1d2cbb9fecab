package proxy

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/authz"
	"sallyport/internal/hop"
	"sallyport/internal/mesh"
	"sallyport/internal/shadow"
	"sallyport/internal/svid"
)

// discard keeps nothing, so that what is measured is the way and not a log in
// memory. Records are made and numbered all the same.
type discard struct{ n atomic.Int64 }

func (d *discard) Append(r *audit.Record) error {
	d.n.Add(1)
	r.ID = "k3v9q2-1f"
	return nil
}

var noDeadline time.Time

const kilobyte = 1 << 10

// benchRig is a rig whose application answers 1 KiB from a fixed buffer.
func benchRig(b *testing.B, change ...func(*rig)) *rig {
	answer := []byte("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 1024\r\n\r\n" + strings.Repeat("x", kilobyte))
	app := rawApp(b, func(c net.Conn, r *bufio.Reader) {
		for skipHead(r) == nil {
			if _, err := c.Write(answer); err != nil {
				return
			}
		}
	})
	return newRig(b, app, append(change, func(r *rig) {
		log := &discard{}
		j, err := authz.NewJudge(authz.JudgeConfig{Audit: log, Log: r.inCfg.Log})
		if err != nil {
			b.Fatal(err)
		}
		r.judge, r.inCfg.Judge, r.inCfg.Audit, r.outCfg.Audit = j, j, log, log
	})...)
}

// skipHead reads a head without body and keeps nothing.
func skipHead(r *bufio.Reader) error {
	for {
		line, err := r.ReadSlice('\n')
		if err != nil || len(line) == 2 {
			return err
		}
	}
}

func roundTrip(b *testing.B, w *wire, request []byte) {
	if _, err := w.Write(request); err != nil {
		b.Fatal(err)
	}
	if err := skipHead(w.r); err != nil {
		b.Fatal(err)
	}
	if _, err := w.r.Discard(kilobyte); err != nil {
		b.Fatal(err)
	}
}

var benchRequest = []byte("GET http://billing.mesh.internal/ok/1 HTTP/1.1\r\nHost: billing.mesh.internal\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n")

// BenchmarkPair is one call through both proxies on kept connections: app ->
// outbound -> mutual TLS -> inbound -> app, all in this process.
func BenchmarkPair(b *testing.B) {
	r := benchRig(b)
	w := r.dial()
	_ = w.SetDeadline(noDeadline)
	roundTrip(b, w, benchRequest)
	b.ReportAllocs()
	for b.Loop() {
		roundTrip(b, w, benchRequest)
	}
}

// BenchmarkPairParallel has 64 such connections, whose calls share the hop or
// have a connection each between the proxies.
func BenchmarkPairParallel(b *testing.B) {
	for name, protos := range map[string][]string{"hop": {hop.Proto}, "http1": {"http/1.1"}} {
		b.Run(name, func(b *testing.B) {
			r := benchRig(b, func(r *rig) { r.protos = protos })
			b.SetParallelism(32)
			b.ReportAllocs()
			var before, after syscall.Rusage
			_ = syscall.Getrusage(syscall.RUSAGE_SELF, &before)
			b.RunParallel(func(pb *testing.PB) {
				w := newWire(b, r.outAddr, nil)
				_ = w.SetDeadline(noDeadline)
				for pb.Next() {
					roundTrip(b, w, benchRequest)
				}
			})
			_ = syscall.Getrusage(syscall.RUSAGE_SELF, &after)
			b.ReportMetric(float64(after.Utime.Nano()+after.Stime.Nano()-before.Utime.Nano()-before.Stime.Nano())/float64(b.N)/1000, "cpu-us/op")
		})
	}
}

// BenchmarkDirect is the same call without proxies, to be subtracted.
func BenchmarkDirect(b *testing.B) {
	answer := []byte("HTTP/1.1 200 OK\r\nContent-Length: 1024\r\n\r\n" + strings.Repeat("x", kilobyte))
	addr := rawApp(b, func(c net.Conn, r *bufio.Reader) {
		for skipHead(r) == nil {
			_, _ = c.Write(answer)
		}
	})
	w := newWire(b, addr, nil)
	_ = w.SetDeadline(noDeadline)
	b.ReportAllocs()
	for b.Loop() {
		roundTrip(b, w, benchRequest)
	}
}

// BenchmarkBulk is 1 MiB up and 1 MiB down through both proxies.
func BenchmarkBulk(b *testing.B) {
	const size = 1 << 20
	body := []byte(strings.Repeat("y", size))
	head := []byte("HTTP/1.1 200 OK\r\nContent-Length: " + strconv.Itoa(size) + "\r\n\r\n")
	addr := rawApp(b, func(c net.Conn, r *bufio.Reader) {
		for skipHead(r) == nil {
			if _, err := r.Discard(size); err != nil {
				return
			}
			_, _ = c.Write(head)
			_, _ = c.Write(body)
		}
	})
	r := newRig(b, addr)
	w := r.dial()
	_ = w.SetDeadline(noDeadline)
	request := append([]byte("POST http://billing.mesh.internal/ok/1 HTTP/1.1\r\nHost: billing.mesh.internal\r\nContent-Length: "+strconv.Itoa(size)+"\r\n\r\n"), body...)
	b.SetBytes(2 * size)
	for b.Loop() {
		if _, err := w.Write(request); err != nil {
			b.Fatal(err)
		}
		if err := skipHead(w.r); err != nil {
			b.Fatal(err)
		}
		if _, err := io.CopyN(io.Discard, w.r, size); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkKept is the memory of connections that are open and have nothing to
// do: buffers, goroutine and TLS state, on the side of the proxy alone.
func BenchmarkKept(b *testing.B) {
	const many = 400
	for _, c := range []struct {
		name    string
		connect func(r *rig) io.Closer
	}{
		{"outbound", func(r *rig) io.Closer { return kept(b, r.outAddr, nil, benchRequest) }},
		{"inbound", func(r *rig) io.Closer {
			return kept(b, r.inAddr, svid.ClientTLS(r.web, billing, "http/1.1"), []byte(okRequest))
		}},
	} {
		b.Run(c.name, func(b *testing.B) {
			for b.Loop() {
				r := benchRig(b)
				c.connect(r).Close()
				before := inUse()
				open := make([]io.Closer, many)
				for i := range open {
					open[i] = c.connect(r)
				}
				b.ReportMetric(float64(inUse()-before)/many/1024, "KiB/conn")
				for _, c := range open {
					c.Close()
				}
				_ = r.stopOut()
				_ = r.stopIn()
			}
		})
	}
}

// kept makes one call and leaves the connection open. Its own TLS state counts
// in the figure.
func kept(b *testing.B, addr string, cfg *tls.Config, request []byte) io.Closer {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		b.Fatal(err)
	}
	if cfg != nil {
		c = tls.Client(c, cfg)
	}
	if _, err := c.Write(request); err != nil {
		b.Fatal(err)
	}
	var answer [4 * kilobyte]byte
	for n := 0; n < kilobyte; {
		k, err := c.Read(answer[:])
		if err != nil {
			b.Fatal(err)
		}
		n += k
	}
	return c
}

// inUse is the memory of heap and stacks.
func inUse() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc + m.StackInuse
}

// BenchmarkShadow is what a caller waits for while all its calls are copied to a
// shadow that hangs, or is gone, beside no shadow at all. Calls begin in turn, so
// that what disturbs the machine disturbs all three.
func BenchmarkShadow(b *testing.B) {
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer silent.Close()
	gone, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	gone.Close()
	next := mesh.Shadow{Name: "next", Share: mesh.Whole, Compare: true}
	kinds := []string{"without", "hangs", "gone"}
	wires := []*wire{
		benchRig(b).dial(),
		benchRig(b, mirrored(b, silent.Addr().String(), next, shadow.Limits{})).dial(),
		benchRig(b, mirrored(b, gone.Addr().String(), next, shadow.Limits{})).dial(),
	}
	took := make([][]time.Duration, len(kinds))
	for _, w := range wires {
		_ = w.SetDeadline(noDeadline)
		roundTrip(b, w, benchRequest)
	}
	for b.Loop() {
		for i, w := range wires {
			begin := time.Now()
			roundTrip(b, w, benchRequest)
			took[i] = append(took[i], time.Since(begin))
		}
	}
	for i, kind := range kinds {
		slices.Sort(took[i])
		for _, p := range []int{50, 99} {
			b.ReportMetric(float64(took[i][len(took[i])*p/100].Nanoseconds())/1000, fmt.Sprintf("%s-p%d-µs", kind, p))
		}
	}
}
