package sink

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/sasl/plain"
	"github.com/twmb/franz-go/pkg/sasl/scram"
)

// KafkaConfig is a topic of a Kafka cluster.
type KafkaConfig struct {
	// Brokers to begin with, host:port each. Required.
	Brokers []string `yaml:"brokers"`
	// Topic must be there. Required.
	Topic string `yaml:"topic"`
	// SASL is how we log in, if at all.
	SASL SASLConfig `yaml:"sasl"`
	// Plaintext speaks without TLS, to loopback addresses only.
	Plaintext bool `yaml:"plaintext"`
	TLS       `yaml:",inline"`
}

// SASLConfig is a login at a Kafka cluster.
type SASLConfig struct {
	// Mechanism is plain, scram-sha-256 or scram-sha-512.
	Mechanism string `yaml:"mechanism"`
	// User is the name to log in with.
	User string `yaml:"user"`
	// Password of the user.
	Password Secret `yaml:"password"`
}

func (c SASLConfig) validate() error {
	if c == (SASLConfig{}) {
		return nil
	}
	var errs []error
	switch c.Mechanism {
	case "plain", "scram-sha-256", "scram-sha-512":
	default:
		errs = append(errs, fmt.Errorf("mechanism: %.40q is not plain, scram-sha-256 or scram-sha-512", c.Mechanism))
	}
	if c.User == "" {
		errs = append(errs, errors.New("user: missing; write who logs in"))
	}
	if c.Password == (Secret{}) {
		errs = append(errs, errors.New("password: missing; write file or env"))
	}
	return errors.Join(append(errs, within("password", c.Password.validate()))...)
}

func (c *KafkaConfig) validate() error {
	var errs []error
	if len(c.Brokers) == 0 {
		errs = append(errs, errors.New(`brokers: missing; write some, such as ["kafka-1.corp.example:9093"]`))
	}
	for i, b := range c.Brokers {
		if err := validateAddress(b); err != nil {
			errs = append(errs, fmt.Errorf("brokers[%d]: %w", i, err))
		} else if host, _, _ := net.SplitHostPort(b); c.Plaintext && !loopback(host) {
			errs = append(errs, fmt.Errorf("plaintext: %s is no loopback address: records do not leave the machine in clear text", b))
		}
	}
	if c.Topic == "" || len(c.Topic) > 249 {
		errs = append(errs, errors.New("topic: write the name of a topic, of at most 249 characters"))
	}
	if c.Plaintext && c.TLS != (TLS{}) {
		errs = append(errs, errors.New("plaintext: and ca, cert or svid are both given; write one"))
	}
	return errors.Join(append(errs, within("sasl", c.SASL.validate()), c.TLS.validate())...)
}

func (c *KafkaConfig) open(env Env, name string) (peer, error) {
	k := &kafka{cfg: *c}
	opts := []kgo.Opt{
		kgo.SeedBrokers(c.Brokers...), kgo.DefaultProduceTopic(c.Topic), kgo.ClientID("sallyport-" + env.Program + "-" + name),
		kgo.RequiredAcks(kgo.AllISRAcks()),
		// One key, one partition: the records of a log stay in order.
		kgo.RecordPartitioner(kgo.StickyKeyPartitioner(nil)),
		// No RecordDeliveryTimeout: it counts from the time of the record, and
		// after an outage every record is old. The context ends an attempt.
		kgo.RetryTimeout(deliverTime / 2), kgo.UnknownTopicRetries(1),
		kgo.ProducerLinger(0), kgo.MaxBufferedRecords(mostRecords + 1),
	}
	if c.Plaintext {
		k.dial = dialLoopback
	} else {
		conf, err := c.TLS.config(env)
		if err != nil {
			return nil, err
		}
		k.dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
			d := tls.Dialer{NetDialer: &net.Dialer{Timeout: deliverTime / 3}, Config: conf}
			return d.DialContext(ctx, network, addr)
		}
	}
	if _, err := c.SASL.Password.read(); err != nil {
		return nil, fmt.Errorf("sasl: password: %w", err)
	}
	k.opts = append(opts, kgo.Dialer(k.dial))
	switch c.SASL.Mechanism {
	case "plain":
		k.opts = append(k.opts, kgo.SASL(plain.Plain(func(context.Context) (plain.Auth, error) {
			pass, err := c.SASL.Password.read()
			return plain.Auth{User: c.SASL.User, Pass: pass}, err
		})))
	case "scram-sha-256", "scram-sha-512":
		auth := func(context.Context) (scram.Auth, error) {
			pass, err := c.SASL.Password.read()
			return scram.Auth{User: c.SASL.User, Pass: pass}, err
		}
		m := scram.Sha256(auth)
		if c.SASL.Mechanism == "scram-sha-512" {
			m = scram.Sha512(auth)
		}
		k.opts = append(k.opts, kgo.SASL(m))
	}
	return k, nil
}

// dialLoopback refuses what the cluster says of brokers elsewhere.
func dialLoopback(ctx context.Context, network, addr string) (net.Conn, error) {
	if host, _, err := net.SplitHostPort(addr); err != nil || !loopback(host) {
		return nil, fmt.Errorf("broker %s is no loopback address: records do not leave the machine in clear text", addr)
	}
	d := net.Dialer{Timeout: deliverTime / 3}
	return d.DialContext(ctx, network, addr)
}

// kafka is the peer of kind kafka: an idempotent producer that waits for all
// replicas in sync. After a failure a new one begins, since the outcome of what
// was under way is not known; within one, a retry makes no duplicate.
type kafka struct {
	cfg    KafkaConfig
	opts   []kgo.Opt
	dial   func(ctx context.Context, network, addr string) (net.Conn, error)
	client *kgo.Client
}

func (k *kafka) deliver(ctx context.Context, b *batch) error {
	if k.client == nil {
		c, err := kgo.NewClient(k.opts...)
		if err != nil {
			return err
		}
		k.client = c
	}
	// ProduceSync does not return for a record whose fate is unknown, as an
	// idempotent producer must not; a closed client gives it up.
	defer context.AfterFunc(ctx, k.client.Close)()
	rs := make([]*kgo.Record, len(b.records))
	for i, r := range b.records {
		rs[i] = &kgo.Record{
			Key: []byte(b.log), Value: r.text[:len(r.text)-1], Timestamp: r.Time.Truncate(time.Millisecond),
			Headers: []kgo.RecordHeader{{Key: "sallyport-seq", Value: strconv.AppendUint(nil, r.Seq, 10)}},
		}
	}
	err := k.client.ProduceSync(ctx, rs...).FirstErr()
	if errors.Is(err, kerr.MessageTooLarge) || errors.Is(err, kerr.RecordListTooLarge) {
		return &refusal{err: err, large: true}
	}
	if errors.Is(err, kerr.InvalidRecord) || errors.Is(err, kerr.InvalidTimestamp) {
		return &refusal{err: err}
	}
	if err != nil && ctx.Err() != nil {
		return fmt.Errorf("no broker of %s has confirmed in time: %w", strings.Join(k.cfg.Brokers, ", "), err)
	}
	return err
}

func (k *kafka) close() {
	if k.client != nil {
		k.client.Close()
		k.client = nil
	}
}
