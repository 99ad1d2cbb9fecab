package isolate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"sallyport/internal/capture"
)

// envRole has this test program be the one that is isolated.
const envRole = "ISOLATE_ROLE"

func TestMain(m *testing.M) {
	if Entering() {
		os.Exit(Enter())
	}
	if os.Getenv(envRole) != "" {
		if err := program(); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// program says where it gets to, and then answers one caller.
func program() error {
	ln, err := net.Listen("tcp", "127.0.0.1:80")
	if err != nil {
		return err
	}
	for _, to := range []string{"198.51.100.1:443", "[2001:db8::1]:443"} {
		c, err := net.Dial("tcp", to)
		if err != nil {
			return err
		}
		b, err := io.ReadAll(c)
		if err != nil {
			return err
		}
		fmt.Printf("%s\n", b)
	}
	c, err := ln.Accept()
	if err != nil {
		return err
	}
	_, err = io.WriteString(c, "hello")
	c.Close()
	return err
}

func TestRoom(t *testing.T) {
	door, door6 := netip.MustParseAddrPort("127.0.0.1:15001"), netip.MustParseAddrPort("[::1]:15001")
	r, err := New(Plan{Listen: []netip.AddrPort{door, door6}, App: netip.MustParseAddrPort("127.0.0.1:80")})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^$")
	if cmd.Path, err = os.Executable(); err != nil {
		t.Fatal(err)
	}
	cmd.Env = append(os.Environ(), envRole+"=program")
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	r.Into(cmd)
	err = Refused(cmd.Start())
	if err == nil {
		err = r.Await()
	}
	if errors.Is(err, ErrForbidden) && os.Getenv("CI") != "true" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range []netip.AddrPort{door, door6} {
		ln, ok := r.Listener(a)
		if !ok {
			t.Fatalf("no listener on %s", a)
		}
		if _, again := r.Listener(a); again {
			t.Errorf("the listener on %s is given twice", a)
		}
		defer ln.Close()
		if err := capture.KeepSYN(ln); err != nil {
			t.Fatal(err)
		}
		go func() {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			defer c.Close()
			_, ok, err := capture.OriginalDst(c)
			from, to, eerr := capture.Ends(c)
			owners := capture.Owners{In: r.Diag()}
			p, oerr := owners.Of(to, from)
			oerr = errors.Join(eerr, oerr)
			fmt.Fprintf(c, "%s %v %v, mine: %v %v", to, ok, err, p.PID == cmd.Process.Pid, oerr)
		}()
	}
	if err := r.Begin(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var c net.Conn
	for c, err = r.Dial(ctx); err != nil && ctx.Err() == nil; c, err = r.Dial(ctx) {
		continue // it does not listen yet
	}
	if err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // else it may still print
		t.Fatalf("%v; it printed:\n%s", err, &out)
	}
	defer c.Close()
	if b, err := io.ReadAll(c); string(b) != "hello" {
		t.Errorf("the program says %q, %v", b, err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("the program ended: %v", err)
	}
	const want = "198.51.100.1:443 true <nil>, mine: true <nil>\n[2001:db8::1]:443 true <nil>, mine: true <nil>\n"
	if got := out.String(); !strings.HasPrefix(got, want) {
		t.Errorf("it got to\n%swant\n%s", got, want)
	}
}

func TestWhatCannotBeExecuted(t *testing.T) {
	r, err := New(Plan{Listen: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:15001")}})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd := exec.CommandContext(t.Context(), "/no/such/program")
	cmd.Err = nil
	r.Into(cmd)
	err = Refused(cmd.Start())
	if err == nil {
		err = r.Await()
	}
	if errors.Is(err, ErrForbidden) && os.Getenv("CI") != "true" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Begin(); err == nil || !strings.Contains(err.Error(), "execute /no/such/program: no such file or directory") {
		t.Errorf("%v", err)
	}
	if cmd.Wait() == nil {
		t.Error("it ended well")
	}
}
