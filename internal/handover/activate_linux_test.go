package handover

import (
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// What a service manager, or an older version, has opened is tuned as what is opened
// here.
func TestAPassedSocketIsTuned(t *testing.T) {
	d := new(Doors)
	at := manager(t, d, map[string]string{"a.listen": "127.0.0.1:0"})
	ln, err := d.TCP("a.listen", at["a.listen"])
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	rc, err := ln.(*Door).Listener.(syscall.Conn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	unsent := 0
	_ = rc.Control(func(fd uintptr) { unsent, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT) })
	if err != nil || unsent <= 0 || unsent > 1<<20 {
		t.Errorf("the kernel holds %d bytes unsent, %v", unsent, err)
	}
}
