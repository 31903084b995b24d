// truthd: an SSE server of exact, known timing. One thread, epoll, a timer of nanoseconds; loopback only.
//
//   truthd PORT LOG TTFT_MS ITL_MS TOKENS_PER_EVENT EVENTS_PER_WRITE
//
// POST /v1/completions and /v1/chat/completions (streamed); anything else gets a small JSON body. Token n of an answer is due at
// t + TTFT + n * ITL, t being when the request was read. SIGTERM ends it. LOG then holds a row for each answer, CLOCK_MONOTONIC ns:
//   read, first write, last write, tokens, latest write in us, sum of lateness in us, writes
// A write is stamped before the call, so that a client never sees a token before its stamp.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define MOST_CONNS 65536
#define BUFFER 16384

typedef struct {
  int fd, active, chat, usage_asked, total, sent, writes, place;
  int64_t read_at, first, last, due, late_max, late_sum;
  char *in, *out;
  size_t in_len, in_room, out_len, out_done;
} conn;

static conn *conns[MOST_CONNS], *heap[MOST_CONNS];
static int heap_len, poller, timer, per_event = 1, per_write = 1;
static int64_t ttft, itl;
static long connections, answers;
static FILE *records;
static volatile sig_atomic_t stop;

static int64_t now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

// -- answers in the order in which they are due: a binary heap

static void swap(int a, int b) {
  conn *t = heap[a];
  heap[a] = heap[b];
  heap[b] = t;
  heap[a]->place = a;
  heap[b]->place = b;
}

static void up(int i) {
  for (; i > 0 && heap[i]->due < heap[(i - 1) / 2]->due; i = (i - 1) / 2) swap(i, (i - 1) / 2);
}

static void down(int i) {
  for (;;) {
    int least = i;
    for (int child = 2 * i + 1; child <= 2 * i + 2; child++)
      if (child < heap_len && heap[child]->due < heap[least]->due) least = child;
    if (least == i) return;
    swap(least, i);
    i = least;
  }
}

static void push(conn *c) {
  c->place = heap_len;
  heap[heap_len++] = c;
  up(c->place);
}

static void unqueue(conn *c) {
  int i = c->place;
  if (i < 0) return;
  heap_len--;
  if (i != heap_len) {
    heap[i] = heap[heap_len];
    heap[i]->place = i;
    up(i);
    down(heap[i]->place);
  }
  c->place = -1;
}

// -- writing

static void watch(int fd, int op, uint32_t events) {
  struct epoll_event e = {.events = events, .data.fd = fd};
  epoll_ctl(poller, op, fd, &e);
}

static void drop(conn *c) {
  unqueue(c);
  conns[c->fd] = NULL;
  close(c->fd);
  free(c->in);
  free(c->out);
  free(c);
}

// Send, and keep what the socket does not take for when it does; -1 when the connection is gone.
static int put(conn *c, const char *bytes, size_t n) {
  if (c->out_len == c->out_done) {
    ssize_t done = send(c->fd, bytes, n, MSG_NOSIGNAL);
    if (done < 0 && errno != EAGAIN) return -1;
    if (done > 0) bytes += done, n -= done;
    if (!n) return 0;
    c->out_len = c->out_done = 0;
  }
  c->out = realloc(c->out, c->out_len + n);
  memcpy(c->out + c->out_len, bytes, n);
  c->out_len += n;
  watch(c->fd, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
  return 0;
}

static size_t chunk(char *to, const char *body, size_t n) {
  size_t head = sprintf(to, "%zx\r\n", n);
  memcpy(to + head, body, n);
  memcpy(to + head + n, "\r\n", 2);
  return head + n + 2;
}

static size_t end_of_answer(conn *c, char *to) {
  char body[512];
  size_t n = 0;
  if (c->usage_asked) {
    int length = sprintf(body,
                         "data: {\"id\":\"c\",\"object\":\"%s\",\"created\":1,\"model\":\"m\",\"choices\":[],"
                         "\"usage\":{\"prompt_tokens\":64,\"completion_tokens\":%d,\"total_tokens\":%d}}\n\n",
                         c->chat ? "chat.completion.chunk" : "text_completion", c->total, c->total + 64);
    n += chunk(to, body, length);
  }
  n += chunk(to + n, "data: [DONE]\n\n", 14);
  memcpy(to + n, "0\r\n\r\n", 5);
  return n + 5;
}

// One event of `count` tokens; usage stands in the last one unless it was asked for on its own.
static size_t event(conn *c, char *to, int count) {
  char text[1100], usage[160] = "", body[2048];
  size_t n = 0;
  c->sent += count;
  int last = c->sent >= c->total;
  for (int i = 0; i < count && n < sizeof text - 8; i++) n += sprintf(text + n, " the");
  if (last && !c->usage_asked)
    sprintf(usage, ",\"usage\":{\"prompt_tokens\":64,\"completion_tokens\":%d,\"total_tokens\":%d}", c->total, c->total + 64);
  int length = sprintf(body,
                       c->chat ? "data: {\"id\":\"c\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"m\",\"choices\":"
                                 "[{\"index\":0,\"delta\":{\"content\":\"%s\"},\"logprobs\":null,\"finish_reason\":%s}]%s}\n\n"
                               : "data: {\"id\":\"c\",\"object\":\"text_completion\",\"created\":1,\"model\":\"m\",\"choices\":"
                                 "[{\"index\":0,\"text\":\"%s\",\"logprobs\":null,\"finish_reason\":%s}]%s}\n\n",
                       text, last ? "\"length\"" : "null", usage);
  return chunk(to, body, length);
}

// What is due on this connection: the first token alone, later up to per_write events of per_event tokens.
static void send_due(conn *c) {
  char bytes[BUFFER];
  size_t n = 0;
  if (c->sent == 0)
    n = sprintf(bytes, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
                       "Cache-Control: no-cache\r\n\r\n");
  int events = c->sent ? per_write : 1;
  while (events-- > 0 && c->sent < c->total) {
    int count = c->sent ? per_event : 1;
    n += event(c, bytes + n, count < c->total - c->sent ? count : c->total - c->sent);
  }
  if (c->sent >= c->total) n += end_of_answer(c, bytes + n);
  int64_t t = now(), late = t - c->due;
  if (late > c->late_max) c->late_max = late;
  c->late_sum += late;
  c->writes++;
  if (!c->first) c->first = t;
  c->last = t;
  unqueue(c);
  if (put(c, bytes, n)) {
    drop(c);
  } else if (c->sent >= c->total) {
    fprintf(records, "%lld,%lld,%lld,%d,%lld,%lld,%d\n", (long long)c->read_at, (long long)c->first, (long long)c->last, c->total,
            (long long)c->late_max / 1000, (long long)c->late_sum / 1000, c->writes);
    c->active = 0;
    answers++;
  } else {
    // An event goes when its last token is due.
    int next = c->sent + per_event * per_write - 1;
    c->due = c->read_at + ttft + itl * (next < c->total ? next : c->total - 1);
    push(c);
  }
}

// -- reading

static const char OTHER[] =
    "{\"object\":\"list\",\"data\":[{\"id\":\"m\",\"object\":\"model\",\"created\":1,\"owned_by\":\"y\"}],\"status\":\"ok\"}";

static void begin(conn *c, const char *body, int chat) {
  const char *limit = strstr(body, "\"max_completion_tokens\"");
  if (!limit) limit = strstr(body, "\"max_tokens\"");
  c->total = limit && (limit = strchr(limit, ':')) ? atoi(limit + 1) : 128;
  if (c->total < 1) c->total = 1;
  c->chat = chat;
  c->usage_asked = strstr(body, "include_usage") != NULL;
  c->active = 1;
  c->sent = c->writes = 0;
  c->first = c->last = c->late_max = c->late_sum = 0;
  c->due = c->read_at + ttft;
  push(c);
}

// Take whole requests out of what was read, one at a time.
static void take(conn *c) {
  while (!c->active && c->in_len) {
    c->in[c->in_len] = 0;
    char *end = strstr(c->in, "\r\n\r\n");
    if (!end) return;
    size_t head = end - c->in + 4, need = head;
    char *length = strcasestr(c->in, "\r\ncontent-length:"), *chunked = strcasestr(c->in, "\r\ntransfer-encoding: chunked");
    if (length && length < end) need += atol(length + 17);
    if (chunked && chunked < end) {
      char *zero = strstr(end + 4, "0\r\n\r\n");
      if (!zero) return;
      need = zero + 5 - c->in;
    }
    if (c->in_len < need) return;
    char kept = c->in[need];
    c->in[need] = 0;
    char *path = strstr(c->in, "completions"), *chat = strstr(c->in, "chat/completions");
    if (!strncmp(c->in, "POST", 4) && path && path < end) {
      begin(c, c->in + head, chat && chat < end);
    } else {
      char reply[512];
      int n = sprintf(reply, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s", sizeof OTHER - 1, OTHER);
      put(c, reply, n);
    }
    c->in[need] = kept;
    memmove(c->in, c->in + need, c->in_len - need);
    c->in_len -= need;
  }
}

static void take_in(conn *c) {
  for (;;) {
    if (c->in_room - c->in_len < 4097) c->in = realloc(c->in, c->in_room *= 2);
    ssize_t n = recv(c->fd, c->in + c->in_len, c->in_room - c->in_len - 1, 0);
    if (n > 0) {
      c->in_len += n;
      c->read_at = c->active ? c->read_at : now();
    } else if (n == 0 || (errno != EAGAIN && errno != EINTR)) {
      drop(c);
      return;
    } else {
      break;
    }
  }
  take(c);
}

static void flush(conn *c) {
  ssize_t n = send(c->fd, c->out + c->out_done, c->out_len - c->out_done, MSG_NOSIGNAL);
  if (n > 0) c->out_done += n;
  if (c->out_done == c->out_len) {
    c->out_done = c->out_len = 0;
    watch(c->fd, EPOLL_CTL_MOD, EPOLLIN);
  }
}

static void accept_all(int listener) {
  int fd, one = 1;
  while ((fd = accept4(listener, 0, 0, SOCK_NONBLOCK)) >= 0) {
    if (fd >= MOST_CONNS) {
      close(fd);
      continue;
    }
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    conn *c = calloc(1, sizeof *c);
    c->fd = fd;
    c->place = -1;
    c->in = malloc(c->in_room = 8192);
    conns[fd] = c;
    connections++;
    watch(fd, EPOLL_CTL_ADD, EPOLLIN);
  }
}

static void on_signal(int number) {
  (void)number;
  stop = 1;
}

static int listen_on(int port) {
  int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1;
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 4096)) {
    perror("truthd: listen");
    exit(1);
  }
  return fd;
}

int main(int argc, char **argv) {
  if (argc != 7 || !(records = fopen(argv[2], "w"))) {
    fprintf(stderr, "usage: truthd PORT LOG TTFT_MS ITL_MS TOKENS_PER_EVENT EVENTS_PER_WRITE\n");
    return 2;
  }
  ttft = atof(argv[3]) * 1e6;
  itl = atof(argv[4]) * 1e6;
  per_event = atoi(argv[5]);
  per_write = atoi(argv[6]);
  if (per_event < 1 || per_write < 1 || per_write * (per_event * 4 + 300) > BUFFER - 1000) {
    fprintf(stderr, "truthd: TOKENS_PER_EVENT and EVENTS_PER_WRITE are at least 1, and few enough for one write\n");
    return 2;
  }
  setvbuf(records, 0, _IOFBF, 1 << 20);
  signal(SIGTERM, on_signal);
  signal(SIGINT, on_signal);
  struct rlimit files;
  getrlimit(RLIMIT_NOFILE, &files);
  files.rlim_cur = files.rlim_max;
  setrlimit(RLIMIT_NOFILE, &files);
  int listener = listen_on(atoi(argv[1]));
  poller = epoll_create1(0);
  timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
  watch(listener, EPOLL_CTL_ADD, EPOLLIN);
  watch(timer, EPOLL_CTL_ADD, EPOLLIN);
  static struct epoll_event ready[512];
  int64_t armed = 0;
  while (!stop) {
    if (heap_len && armed != heap[0]->due) {
      armed = heap[0]->due;
      struct itimerspec when = {.it_value = {armed / 1000000000, armed % 1000000000}};
      timerfd_settime(timer, TFD_TIMER_ABSTIME, &when, 0);
    }
    int n = epoll_wait(poller, ready, 512, 1000);
    for (int i = 0; i < n; i++) {
      int fd = ready[i].data.fd;
      uint64_t ticks;
      if (fd == timer) {
        if (read(timer, &ticks, sizeof ticks) > 0) armed = 0;
      } else if (fd == listener) {
        accept_all(listener);
      } else if (conns[fd]) {
        if (ready[i].events & EPOLLOUT) flush(conns[fd]);
        if (ready[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) take_in(conns[fd]);
      }
    }
    for (int64_t t = now(); heap_len && heap[0]->due <= t;) send_due(heap[0]);
  }
  fprintf(stderr, "connections=%ld answers=%ld\n", connections, answers);
  return fclose(records) ? 1 : 0;
}
