package sink

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"sallyport/internal/audit"
)

// SyslogConfig is a syslog server (RFC 5424) behind TLS (RFC 5425).
type SyslogConfig struct {
	// Address is host:port; the port of RFC 5425 is 6514. Required.
	Address string `yaml:"address"`
	// Enterprise is the number in the SD-ID "sallyport@<number>". Default 32473,
	// which IANA keeps for examples.
	Enterprise uint32 `yaml:"enterprise"`
	TLS        `yaml:",inline"`
}

func (c *SyslogConfig) validate() error {
	var errs []error
	if err := validateAddress(c.Address); err != nil {
		errs = append(errs, fmt.Errorf("address: %w", err))
	}
	return errors.Join(append(errs, c.TLS.validate())...)
}

// validateAddress checks a host:port.
func validateAddress(addr string) error {
	host, port, err := net.SplitHostPort(addr)
	if n, e := strconv.ParseUint(port, 10, 16); err != nil || host == "" || e != nil || n == 0 {
		return fmt.Errorf("%.80q is not host:port, such as siem.corp.example:6514", addr)
	}
	return nil
}

func (c *SyslogConfig) open(env Env, _ string) (peer, error) {
	conf, err := c.TLS.config(env)
	if err != nil {
		return nil, err
	}
	host, err := os.Hostname()
	if err != nil || host == "" || len(host) > 255 || strings.ContainsFunc(host, func(r rune) bool { return r <= ' ' || r > '~' }) {
		host = "-"
	}
	s := &syslog{addr: c.Address, dial: tls.Dialer{Config: conf}}
	s.head = fmt.Sprintf(" %s sallyport-%s %d ", host, env.Program, os.Getpid())
	s.sdID = fmt.Sprintf("[sallyport@%d", cmp.Or(c.Enterprise, 32473))
	return s, nil
}

// syslog is the peer of kind syslog. The protocol has no answer, so each batch
// has a connection of its own: the server answers our close_notify with the end
// of the connection once it has read all (RFC 5425, 4.4), and a kernel that
// still held unread bytes resets it instead.
type syslog struct {
	addr       string
	dial       tls.Dialer
	head, sdID string
}

func (s *syslog) deliver(ctx context.Context, b *batch) error {
	nc, err := s.dial.DialContext(ctx, "tcp", s.addr)
	if err != nil {
		return err
	}
	defer nc.Close()
	if end, ok := ctx.Deadline(); ok {
		if err := nc.SetDeadline(end); err != nil {
			return err
		}
	}
	defer context.AfterFunc(ctx, func() { nc.SetDeadline(time.Unix(1, 0)) })()
	c := nc.(*tls.Conn)
	out := make([]byte, 0, b.bytes+256*len(b.records))
	for i := range b.records {
		out = s.frame(out, b, &b.records[i])
	}
	if _, err := c.Write(out); err != nil {
		return err
	}
	if err := c.CloseWrite(); err != nil {
		return err
	}
	// A server may end without close_notify; what counts is that TCP ends in
	// order, since that is what says that all was read.
	if _, err := io.Copy(io.Discard, c); err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("the server did not confirm by closing the connection: %w", err)
	}
	if _, err := io.Copy(io.Discard, c.NetConn()); err != nil {
		return fmt.Errorf("the server closed without reading all: %w", err)
	}
	return nil
}

func (s *syslog) close() {}

// The parts of PRI: facility 13 is "log audit".
const (
	facility = 13
	sevError = 3
	sevWarn  = 4
	sevInfo  = 6
)

func severity(r *audit.Record) int {
	switch {
	case r.Kind == audit.KindError || r.Kind == audit.KindGap:
		return sevError
	case r.Decision == audit.Deny:
		return sevWarn
	}
	return sevInfo
}

// frame appends a message with its length before it (octet counting).
func (s *syslog) frame(out []byte, b *batch, r *record) []byte {
	m := fmt.Appendf(nil, "<%d>1 %s", facility*8+severity(&r.Record), r.Time.UTC().Format("2006-01-02T15:04:05.000000Z"))
	m = append(m, s.head...)
	m = append(append(m, r.Kind...), ' ')
	m = append(m, s.sdID...)
	for _, p := range [...][2]string{
		{"log", b.log}, {"seq", strconv.FormatUint(r.Seq, 10)}, {"id", r.ID}, {"decision", r.Decision},
		{"reason", r.Reason}, {"rule", r.Rule}, {"src", r.Src}, {"dst", r.Dst},
	} {
		if p[1] != "" {
			m = append(append(append(m, ' '), p[0]...), '=', '"')
			m = append(sdEscape(m, p[1]), '"')
		}
	}
	m = append(m, ']', ' ')
	m = append(m, strings.TrimSuffix(string(r.text), "\n")...)
	out = append(strconv.AppendInt(out, int64(len(m)), 10), ' ')
	return append(out, m...)
}

// sdEscape appends a PARAM-VALUE. Control characters, which the form allows and
// many servers do not, become blanks; the message has them as they were.
func sdEscape(m []byte, v string) []byte {
	for _, r := range v {
		switch {
		case r == '"' || r == '\\' || r == ']':
			m = append(m, '\\', byte(r))
		case r < ' ' || r == 0x7f:
			m = append(m, ' ')
		default:
			m = append(m, string(r)...)
		}
	}
	return m
}
