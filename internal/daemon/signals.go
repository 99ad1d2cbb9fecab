package daemon

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"
)

// Signals returns two contexts for a stop in two steps. The first SIGINT or
// SIGTERM ends stop: take no new work, finish what runs. The second ends now:
// leave at once. After that the signals have their default effect again.
// Cancel ends both and gives the signals back.
func Signals(parent context.Context) (stop, now context.Context, cancel func()) {
	ch := make(chan os.Signal, 2)
	signal.Notify(ch, os.Interrupt, syscall.SIGTERM)
	now, cancelNow := context.WithCancel(parent)
	stop, cancelStop := context.WithCancel(now)
	go func() {
		defer signal.Stop(ch)
		for _, end := range []func(){cancelStop, cancelNow} {
			select {
			case <-ch:
				end()
			case <-now.Done():
				return
			}
		}
	}()
	return stop, now, func() {
		signal.Stop(ch)
		cancelStop()
		cancelNow()
	}
}

// Notify sends state, such as "READY=1", to the service manager that
// NOTIFY_SOCKET names (sd_notify(3)); a name that starts with "@" is an
// abstract socket. Without a service manager it does nothing.
func Notify(state string) error {
	name := os.Getenv("NOTIFY_SOCKET")
	if name == "" {
		return nil
	}
	if name[0] != '/' && name[0] != '@' {
		return fmt.Errorf("notify systemd: NOTIFY_SOCKET %q is neither an absolute path nor an abstract name", name)
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("notify systemd: %w", err)
	}
	defer c.Close()
	if _, err := c.Write([]byte(state)); err != nil {
		return fmt.Errorf("notify systemd: %w", err)
	}
	return nil
}

// WatchdogEvery returns how often to send "WATCHDOG=1": half of what the
// service manager tolerates, or 0 when it does not ask.
func WatchdogEvery() time.Duration {
	usec, err := strconv.ParseInt(os.Getenv("WATCHDOG_USEC"), 10, 64)
	if err != nil || usec <= 0 || usec > int64(24*time.Hour/time.Microsecond) {
		return 0
	}
	if pid := os.Getenv("WATCHDOG_PID"); pid != "" && pid != strconv.Itoa(os.Getpid()) {
		return 0
	}
	return time.Duration(usec) * time.Microsecond / 2
}
